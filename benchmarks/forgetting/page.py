"""The page of a folder of cells, and its picture. They can be written again whenever there are more cells."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from run import Cell, load
from scipy.stats import f as fisher

from hft.record.palette import COLORS, FAINT, INK, MARKERS, OWN
from hft.reporting.statistics import (
    Curve,
    Estimate,
    difference,
    equal_learning,
    estimate,
    frontier,
    hypervolume,
    shared_range,
)

# Measures of a cell's rows: key, name, unit.
COLUMNS = {
    "new.right": ("new rows right", "%"),
    "new.loss": ("loss on the new rows", "nats/token"),
    "pairs.right": ("pairs right", "%"),
    "pairs.margin": ("margin", "nats"),
    "rule.right": ("rule right", "%"),
    "recovered.rule.right": ("rule right after ten examples", "%"),
    "people.right": ("people right", "%"),
    "facts.right": ("facts right", "%"),
    "text.loss": ("loss on text", "nats/token"),
    "text.kl": ("KL on text", "nats/token"),
    "new.kl": ("KL on the new rows", "nats/token"),
    "pairs.kl": ("KL on the pairs", "nats/token"),
}
OLD = ("rule.right", "people.right", "facts.right")
# What learning an amount means, as a phrase.
LEARNING = {
    "new.right": "answer {} of the new rows right",
    "new.loss": "have a loss of {} on the new rows",
    "pairs.right": "prefer the right answer in {} of the held-out pairs",
}
KEPT = ("kept", "%")
STEP = {"%": 5, "nats/token": 0.05}  # between the amounts learned at which two arms may be compared

Content = dict[str, Any]  # of a cell's file
Rates = dict[float, dict[int, Content]]  # learning rate, or the alpha of a way back -> seed -> content


def values(cell: Content, key: str) -> np.ndarray:
    """A measure of each row; `kept` is of all old questions."""
    rows = cell["rows"]
    found = [value for old in OLD for value in rows.get(old, ())] if key == "kept" else rows[key]
    return np.array(found) * (100 if key == "kept" or key.endswith("right") else 1)


def sign(key: str) -> int:
    return -1 if key.endswith(("loss", "kl")) else 1


def read(out: Path, todo: list[Cell]) -> tuple[dict[str, Rates], dict[str, Rates], list[Content]]:
    """The cells that are there by arm, the ways back to the start model by run, and all files."""
    arms: dict[str, Rates] = {}
    ways: dict[str, Rates] = {}
    files = []
    for cell in todo:
        path = out / "cells" / f"{cell.name}.json.gz"
        if cell.seed != cell.selection or not path.exists():
            continue
        files.append(load(path))
        if "way" in files[-1]:
            for point in files[-1]["way"]:
                way = ways.setdefault(f"{cell.arm} at {cell.learning_rate:g}, toward the start", {})
                way.setdefault(point["alpha"], {})[cell.seed] = point
        else:
            arms.setdefault(cell.arm, {}).setdefault(cell.learning_rate, {})[cell.seed] = files[-1]
    return arms, ways, files


def whole(rates: Rates) -> tuple[list[float], list[int]]:
    """The seeds that have the most rates, and the rates that all of these seeds have."""
    counts = {seed: sum(seed in cells for cells in rates.values()) for cells in rates.values() for seed in cells}
    seeds = sorted(seed for seed, count in counts.items() if count == max(counts.values()))
    return sorted(rate for rate, cells in rates.items() if set(seeds) <= cells.keys()), seeds


def curves(pair: tuple[Rates, ...], learned: str, kept: str) -> tuple[list[Curve], list[int]]:
    """The curves of arms on the seeds that they share."""
    seeds = sorted(set.intersection(*(set(whole(rates)[1]) for rates in pair)))
    if not seeds:
        return [], []

    def cube(rates: Rates, key: str) -> np.ndarray:
        return sign(key) * np.array([[values(rates[r][s], key) for s in seeds] for r in whole(rates)[0]])

    same = learned.partition(".")[0] == kept.partition(".")[0]
    return [Curve(cube(rates, learned), cube(rates, kept), same) for rates in pair], seeds


def kept_at(points: np.ndarray, level: float) -> float:
    """What a method keeps where it has learned an amount, as in `equal_learning`; nan where it has not."""
    return float(np.interp(level, *frontier(points).T, right=np.nan))


def at_the_most(before: Curve, after: Curve, step: float) -> tuple[float, Estimate] | None:
    """The highest step below what both learn, and in nearly every draw, and how much more `after` keeps there."""
    low, high = shared_range(before.mean_points, after.mean_points)
    level = (np.ceil(high / step) - 1) * step  # where all is learned, many rates learn as much
    while level >= low:
        found = estimate(lambda a, b, level=level: kept_at(b, level) - kept_at(a, level), before, after)
        if np.isfinite(found.low):
            return float(level), found
        level -= step
    return None


def rate_alike(before: np.ndarray, after: np.ndarray, rates: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """For each rate of `after`: log of the factor at which `before` learns as much, and how much more `after` keeps.

    Between the rates of `before`, up to the one that learns the most, what it learns and keeps are straight lines over
    the log of the rate. Of shape (rates, 2); nan outside of what it learns, and above the best rate of `after`.
    """
    top = before[:, 0].argmax() + 1
    logs, learned = np.log(rates[0][:top]), np.maximum.accumulate(before[:top, 0])
    found = np.full((len(after), 2), np.nan)
    for n, (level, kept) in enumerate(after[: after[:, 0].argmax() + 1]):
        if learned[0] <= level < learned[-1]:  # several rates may learn the most
            alike = np.interp(level, learned, logs)
            found[n] = alike - np.log(rates[1][n]), kept - np.interp(alike, logs, before[:top, 1])
    return found


def shown(found: Estimate, digits: int = 1, plus: str = "+") -> str:
    """A number with its interval."""
    if not np.isfinite(found.value):
        return ""
    low, high = (f"{end:{plus}.{digits}f}" for end in (found.low, found.high))
    return f"{found.value:{plus}.{digits}f}" + (f" [{low}, {high}]" if np.isfinite(found.low) else " [no interval]")


def verdict(found: Estimate) -> str:
    if not np.isfinite(found.low) or found.low <= 0 <= found.high:
        return "not significant"
    return "keeps more" if found.value > 0 else "keeps less"


def bold(found: Estimate, digits: int = 1) -> str:
    """A difference with its interval, bold if that excludes 0."""
    return shown(found, digits) if verdict(found) == "not significant" else f"**{shown(found, digits)}**"


def amount(level: float, learned: str) -> str:
    return f"{round(level, 1):g}%" if learned.endswith("right") else f"{-level:.2f} nats/token"


def of_seeds(seeds: list[int]) -> str:
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "n = 1 seed: the interval is over rows only"


def most_seeds(arms: dict[str, Rates]) -> int:
    return max(len(cells) for rates in arms.values() for cells in rates.values())


def sentence(arm: str, pair: tuple[Rates, Rates], learned: str) -> str:
    """What an arm keeps beside fft where both have learned as much."""
    its, seeds = curves(pair, learned, "kept")
    overall = estimate(equal_learning, *its) if its else Estimate(*[float("nan")] * 3)
    if not np.isfinite(overall.low):
        return f"{arm} and fft cannot be compared at equal learning: no amount was surely learned by both."
    told = verdict(overall)
    says = f"{arm} and fft do not differ significantly in what they keep"
    says = says if told == "not significant" else f"{arm} {told} than fft"
    more = f"{shown(overall)} points on average over the amounts that both learn"
    if found := at_the_most(*its, STEP[COLUMNS[learned][1]]):
        where = LEARNING[learned].format(amount(found[0], learned))
        also = verdict(found[1])
        more += f", and {shown(found[1])} where both {where}"
        more += f" ({also})" if also != told else ""
    rough = " Two learning rates give only a rough curve." if min(len(whole(rates)[0]) for rates in pair) < 3 else ""
    return f"At equal learning {says}: {arm} minus fft is {more} (95% intervals, {of_seeds(seeds)}).{rough}"


def rates_section(arms: dict[str, Rates], learned: str) -> list[str]:
    """Whether hft is fft at a lower learning rate."""
    pair = (arms["fft"], arms["hft"])
    its, seeds = curves(pair, learned, "kept")
    if not its:
        return []
    rates = tuple(np.array(whole(one)[0]) for one in pair)

    def average(compared: list[int], column: int) -> Estimate:
        """Of the factor, by its log (column 0), or of how much more is kept (1)."""

        def statistic(a: np.ndarray, b: np.ndarray) -> float:
            found = rate_alike(a, b, rates)[compared, column]
            return float(found[np.isfinite(found)].mean()) if np.isfinite(found).any() else np.nan

        found = estimate(statistic, *its)
        return found if column else Estimate(*np.exp(found))

    names = ["learning rate of hft", f"{COLUMNS[learned][0]}", "c", "hft keeps, %", "fft at c x rate keeps, %"]
    lines = [f"| {' | '.join([*names, 'hft keeps more, points'])} |", "| --- " * 6 + "|"]
    compared, most = [], its[0].mean_points[:, 0].max()
    for n, (rate, (level, kept)) in enumerate(zip(rates[1], its[1].mean_points, strict=True)):
        factor, more = average([n], 0), average([n], 1)
        outside = "no less than fft ever learns" if level >= most else "less than fft learns"
        cells = [f"{rate:g}", amount(level, learned), shown(factor, 2, "") or outside, f"{kept:.1f}"]
        if n > its[1].mean_points[:, 0].argmax():
            cells[2] = "above hft's best rate"
        cells += [f"{kept - more.value:.1f}", bold(more)] if np.isfinite(more.value) else ["", ""]
        compared += [n] if np.isfinite(factor.low) else []
        lines.append(f"| {' | '.join(cells)} |")
    title = ["", "## Does hft act like fft at a lower rate?", ""]
    if not compared:
        return [
            *title,
            "These learning rates cannot tell: at none of them does fft surely learn as much.",
            "",
            *lines,
        ]
    factor, more = average(compared, 0), average(compared, 1)
    of = f"the mean of the {len(compared)} rates with an interval" if len(compared) > 1 else "at one rate"
    return [
        *title,
        f"To learn as much as hft, fft needs c times hft's learning rate: c = {shown(factor, 2, '')}, {of}. The "
        f"difference in kept questions there, hft minus fft, is {shown(more)} points ({verdict(more)}; "
        f"{of_seeds(seeds)}). Between its learning rates fft is interpolated linearly in the log of the rate.",
        "",
        *lines,
    ]


def beside_fft(arms: dict[str, Rates], arm: str, finer: Any) -> tuple[Rates, Rates]:
    """fft and an arm; without fft's finer rates if the arm has none, since a finer curve lies higher."""
    fft = arms["fft"] if arm in finer else {rate: arms["fft"][rate] for rate in arms["fft"] if rate not in finer["fft"]}
    return fft, arms[arm]


def arms_section(arms: dict[str, Rates], learned: str, reference: np.ndarray, finer: Any) -> list[str]:
    """Each arm beside fft: what is kept at equal learning, hypervolume, and what two seeds differ by."""

    unit = COLUMNS[learned][1]

    def volume(points: np.ndarray) -> float:
        return hypervolume(points, reference) / (100 if unit == "%" else 1)

    heads = ["arm", "seeds", "learns most at", "kept on average, points", "over", "kept at the most, points"]
    heads += ["hypervolume", "minus fft's", "difference of two seeds"]
    lines, alike = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"], []
    for arm, rates in arms.items():
        [own], seeds = curves((rates,), learned, "kept")
        best = whole(rates)[0][own.mean_points[:, 0].argmax()]
        way = "toward the start" in arm  # of more points than a curve over rates, so that it dominates more
        edge = "" if min(rates) < best < max(rates) or way else ", at the edge"
        of_seed = [volume(np.stack([own.learned[:, n].mean(1), own.kept[:, n].mean(1)], 1)) for n in range(len(seeds))]
        apart = [abs(a - b) for a, b in itertools.combinations(of_seed, 2)]
        cells = [arm, len(seeds), f"{best:g}{edge}", *[""] * 6]
        if not way:
            cells[6] = shown(estimate(volume, own), plus="")
            cells[8] = f"{statistics.fmean(apart):.1f}" if apart else ""
        pair, shared = curves(beside_fft(arms, arm, finer), learned, "kept")
        if arm != "fft" and shared:
            cells[1], cells[3] = len(shared), bold(estimate(equal_learning, *pair))
            ends = [amount(level, learned) for level in shared_range(*(curve.mean_points for curve in pair))]
            cells[4] = " to ".join(ends)
            if found := at_the_most(*pair, STEP[unit]):
                cells[5] = f"at {amount(found[0], learned)}: {bold(found[1])}"
            if not way:
                more = estimate(lambda a, b: volume(b) - volume(a), *pair)
                cells[7] = bold(more)
                alike += [arm] if apart and statistics.fmean(apart) >= abs(more.value) else []
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if alike:
        said = (
            "Two seeds differ as much in hypervolume as the arm and fft do, so two runs of different seeds cannot tell"
        )
        lines += ["", f"{said} which is better, for {', '.join(alike)}."]
    return lines


def minus_fft(arms: dict[str, Rates], arm: str, learned: str, key: str, finer: Any) -> Estimate:
    """Any measure at equal learning, on average over the amounts that both learn."""
    pair, _ = curves(beside_fft(arms, arm, finer), learned, key)
    found = estimate(equal_learning, *pair) if pair else Estimate(*[float("nan")] * 3)
    return Estimate(-found.value, -found.high, -found.low) if sign(key) < 0 else found


def measures_section(arms: dict[str, Rates], learned: str, keys: list[str], finer: Any) -> list[str]:
    """Every other measure at equal learning, arm minus fft."""
    heads = [", ".join(COLUMNS[key]) for key in keys]
    lines = [f"| arm | {' | '.join(heads)} |", "| --- " * (len(keys) + 1) + "|"]
    for arm in (arm for arm in arms if arm != "fft"):
        cells = [bold(minus_fft(arms, arm, learned, key, finer), 1 if COLUMNS[key][1] == "%" else 2) for key in keys]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def seeds_section(arms: dict[str, Rates], learned: str) -> list[str]:
    """At equal learning rates: two methods, beside two seeds of one method."""
    name, unit = COLUMNS[learned]
    heads = ["learning rate", "seeds"]
    heads += [f"{what}: {which}" for what in (f"{name}, {unit}", "kept, %") for which in ("hft - fft", "two seeds")]
    lines, alike = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"], []
    for rate in sorted(arms["fft"].keys() & arms["hft"].keys()):
        pair = arms["fft"][rate], arms["hft"][rate]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        if len(seeds) < 2:
            continue
        cells = []
        for key in (learned, "kept"):
            rows = [np.array([values(one[seed], key) for seed in seeds]) for one in pair]
            more = difference(rows[:1], rows[1:], matched=True)
            means = [one.mean(1) for one in rows]
            own = statistics.fmean(abs(a - b) for one in means for a, b in itertools.combinations(one, 2))
            interval = more.interval if more.se else (np.nan, np.nan)  # no row changed: it cannot say how sure that is
            cells += [bold(Estimate(more.mean, *interval), 1 if unit == "%" else 2), f"{own:.2f}"]
            if own >= abs(more.mean) and own and key == "kept":
                alike.append(f"{rate:g}")
        lines.append(f"| {rate:g} | {len(seeds)} | {' | '.join(cells)} |")
    if len(lines) == 2:
        return []
    said = "Two methods at equal learning rates, and two runs of one method that differ only in the seed."
    if alike:
        said += f" At {', '.join(alike)} two seeds differ as much in what they keep as the methods do, so two runs of "
        said += "different seeds cannot tell which is better."
    said += " Intervals are paired over rows and seeds, as those of `hft compare`."
    return ["", "## Two seeds or two methods", "", said, "", *lines]


def halves_section(out: Path, content: dict[str, Any], learned: str, keys: list[str]) -> list[str]:
    """How much the choice of the half changes, beside how much the order of the rows does."""
    from run import halves

    groups: dict[str, dict[str, Content]] = {"selections": {}, "orders": {}}
    for cell in halves(content):
        path = out / "cells" / f"{cell.name}.json.gz"
        if path.exists():
            its = load(path)
            groups["selections"] |= {cell.name: its} if cell.seed == 0 else {}
            groups["orders"] |= {cell.name: its} if cell.selection == 0 else {}
    selections, orders = (list(group.values()) for group in groups.values())
    if min(len(selections), len(orders)) < 3:
        return []
    degrees = len(selections) - 1, len(orders) - 1
    heads = ["", f"sd of {len(selections)} selections", f"sd of {len(orders)} orders", "ratio of variances"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    said = ""
    for key in dict.fromkeys((learned, "kept", *keys)):
        spread = [statistics.stdev(values(cell, key).mean() for cell in group) for group in (selections, orders)]
        ratio = ""
        if min(spread):
            found = (spread[0] / spread[1]) ** 2
            low, high = (found / fisher.ppf(tail, *degrees) for tail in (0.975, 0.025))
            ratio = f"{found:.2f} [{low:.2f}, {high:.2f}]"
            told = low > 1 or high < 1
            if key == "kept":
                said = f" For kept questions the ratio of variances is {ratio}, {'' if told else 'not '}significant."
            ratio = f"**{ratio}**" if told else ratio
        lines.append(f"| {', '.join(COLUMNS.get(key, KEPT))} | {spread[0]:.2g} | {spread[1]:.2g} | {ratio} |")
    its = content["halves"]
    return [
        "",
        "## Does the half matter?",
        "",
        f"{its['arm']} at learning rate {its['learning_rate']:g}: {len(selections)} selections with one order of the "
        f"rows, and {len(orders)} orders with one selection.{said} Brackets: 95% intervals of the ratio of variances, "
        "from the F distribution. Over five selections the paper has a standard deviation of 0.1 points (Table 14).",
        "",
        *lines,
    ]


def table(arms: dict[str, Rates], references: dict[str, Content], keys: list[str]) -> list[str]:
    """Every arm at every rate: mean and standard deviation over seeds."""
    heads = ["arm", "learning rate or part", "seeds", *(", ".join(COLUMNS.get(k, KEPT)) for k in keys)]
    lines = [f"| {' | '.join([*heads, 'weights moved'])} |", "| --- " * (len(heads) + 1) + "|"]
    places = [("", "", {0: cell}, name) for name, cell in references.items()]
    places += [(arm, f"{rate:g}", rates[rate], arm) for arm, rates in arms.items() for rate in sorted(rates)]
    for _, rate, cells, name in places:
        columns = [
            [values(cell, key).mean() for cell in cells.values() if key == "kept" or key in cell["rows"]]
            for key in keys
        ]
        columns.append([cell["distance"]["all"] for cell in cells.values()])
        texts = [
            f"{statistics.fmean(its):.3g}" + (f" ± {statistics.stdev(its):.2g}" if len(its) > 1 else "") if its else ""
            for its in columns
        ]
        lines.append(f"| {name} | {rate} | {len(cells)} | {' | '.join(texts)} |")
    return lines


def ways_section(ways: dict[str, Rates], learned: str) -> list[str]:
    """What is learned and kept at each part of the way from the start model to a trained one."""
    if not ways:
        return []
    parts = sorted(next(iter(ways.values())))
    lines = [f"| a | {' | '.join(f'{part:g}' for part in parts)} |", "| --- " * (len(parts) + 1) + "|"]
    for name, way in ways.items():
        for key, what in ((learned, "learned"), ("kept", "kept")):
            means = [statistics.fmean(values(cell, key).mean() for cell in way[part].values()) for part in parts]
            lines.append(f"| {name}: {what} | {' | '.join(f'{mean:.3g}' for mean in means)} |")
    return [
        "",
        "## Toward the start model",
        "",
        f"Models at start + a x (trained - start): {COLUMNS[learned][0]} and kept, means over seeds.",
        "",
        *lines,
    ]


def picture(
    arms: dict[str, Rates], ways: dict[str, Rates], start: Content, learned: str, content: dict[str, Any], path: Path
) -> None:
    """What is kept against what is learned: a line per arm over its learning rates, means and deviations over seeds."""
    from matplotlib.figure import Figure

    seeds, finer = most_seeds(arms), content.get("finer", {})
    named = [arm for arm in content.get("named", arms) if arm in arms]
    others = [arm for arm in arms if arm not in named]
    both = [arm for arm in ("fft", "hft") if arm in arms]
    panels = [named, *([*both, *others[n : n + len(COLORS)]] for n in range(0, len(others), len(COLORS)))]
    figure = Figure(figsize=(max(7.4, 5.4 * len(panels)), 6.6), layout="constrained")

    begin = [values(start, key).mean() for key in (learned, "kept")]

    def learners(rates: Rates) -> list[float]:
        """Learning rates at which the model learned anything; the others are only in the table."""
        means = {
            rate: statistics.fmean(values(cell, learned).mean() for cell in rates[rate].values()) for rate in rates
        }
        return sorted(rate for rate, mean in means.items() if sign(learned) * (mean - begin[0]) >= 0)

    def line(rates: Rates) -> np.ndarray:
        """Mean and standard deviation of learned and kept per rate, of shape (4, rates)."""
        found = []
        for rate in learners(rates):
            means = [[values(cell, key).mean() for cell in rates[rate].values()] for key in (learned, "kept")]
            found.append([*map(statistics.fmean, means), *(statistics.stdev(m) if len(m) > 1 else 0 for m in means)])
        return np.array(found).T

    name, unit = COLUMNS[learned]
    for axes, those in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        main = axes is figure.axes[0]
        for n, arm in enumerate(arm for arm in arms if arm not in those):
            axes.plot(*line(arms[arm])[:2], color=FAINT, linewidth=1, zorder=1, label="" if n else "other panels")
        looks = zip(COLORS, MARKERS.replace(OWN["fft"][1], ""), strict=False)
        for arm in those:
            color, marker = OWN.get(arm) or next(looks)
            style = {"color": color, "marker": marker, "markeredgecolor": "white", "elinewidth": 0.9}
            style |= {"linewidth": 2.4, "zorder": 4} if arm in OWN else {"linewidth": 1.3, "zorder": 3}
            x, y, dx, dy = line(arms[arm])
            axes.errorbar(x, y, dy, dx, label=arm, **style)
            labeled = [
                point for point in zip(learners(arms[arm]), x, y, strict=True) if point[0] not in finer.get(arm, ())
            ]
            for rate, *at in labeled if main and arm in OWN else ():
                offset, side = ((6, 6), "left") if arm == "fft" else ((-6, -12), "right")
                axes.annotate(f"{rate:g}", at, offset, textcoords="offset points", ha=side, color=color, fontsize=8)
        first = {name.partition(" ")[0]: name for name in reversed(ways)} if main else {}  # rate of each arm
        for arm, way in first.items():
            axes.plot(*line(ways[way])[:2], "--", color=OWN.get(arm, (INK,))[0], linewidth=1.3, zorder=2, label=way)
        axes.plot(*begin, "*", color=INK, markersize=13, zorder=5)
        axes.annotate("start model", begin, (10, 3), textcoords="offset points", color=INK, fontsize=9)
        axes.set(xlabel=f"learned: {name}, {unit} (better →)")
        axes.xaxis.set_inverted(sign(learned) < 0)
        axes.grid(color=FAINT, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.axes[0].set_ylabel("kept: old questions still answered right, % (better ↑)")
    figure.suptitle(
        "What a model learns and what it still knows: up and to the right is better\n"
        "A line per method, over learning rates (numbers); "
        + (f"bars: standard deviation over up to {seeds} seeds" if seeds > 1 else "one seed"),
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def write_page(out: Path, content: dict[str, Any], todo: list[Cell], path: Path, command: str) -> str:
    """Write a page and a picture beside it, and return the verdict."""
    arms, ways, files = read(out, todo)
    if not files:
        return "no cells yet"
    others = {name: out / "cells" / f"{name}.json.gz" for name in ("pretrained", "start")}
    references = {name: load(cell) for name, cell in others.items() if cell.exists()}
    start, finer = references["start"], content.get("finer", {"fft": ()})
    learned = content.get("learned", "new.right")
    keys = [
        key
        for key in COLUMNS
        if any(key in one["rows"] for rates in arms.values() for one in rates[min(rates)].values())
    ]
    kinds = {key.partition(".")[0]: len(start["rows"][key]) for key in OLD if key in start["rows"]}
    picture(arms, ways, start, learned, content, path.with_suffix(".png"))
    reference = np.array([sign(learned) * values(start, learned).mean(), 0.0])
    lines = ["# What each method learns and what it forgets", "", f"    {command}", ""]
    lines += [content["about"], ""] if "about" in content else []
    said = ""
    if {"fft", "hft"} <= arms.keys():
        said = sentence("hft", (arms["fft"], arms["hft"]), learned)
        lines += [f"**{said}**", ""]
        if learned == "new.right":
            again = sentence("hft", (arms["fft"], arms["hft"]), "new.loss")
            lines += [f"With the loss of the new rows as the measure of learning: {again[0].lower()}{again[1:]}", ""]
        if "text.loss" in keys:
            more = minus_fft(arms, "hft", learned, "text.loss", finer)
            lines += [f"Loss on text at equal learning, hft minus fft: {shown(more, 2)} nats/token.", ""]
    count = f"{len(files)} of {sum(cell.seed == cell.selection for cell in todo)} cells"
    if len(files) < sum(cell.seed == cell.selection for cell in todo):
        lines += [f"This page is of {count}.", ""]
    lines += [
        f"![What is kept against what is learned]({path.stem}.png)",
        "",
        f"Learned: {COLUMNS[learned][0]}, of {len(start['rows'][learned])} held-out rows. Kept: the share of "
        f"{sum(kinds.values())} old questions ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}) that is still "
        f"answered right; the start model answers {values(start, 'kept').mean():.1f}%. Differences are between models "
        "that answered the same rows, with the same seeds. Brackets are 95% intervals: a bootstrap over rows and "
        "seeds, widened for few seeds as by the t distribution. No interval: undefined in at least 5% of the draws. "
        "Bold: the interval excludes 0. Differences are not corrected for multiple comparisons. The picture leaves out "
        "points that learned less than the start model.",
    ]
    if {"fft", "hft"} <= arms.keys():
        lines += rates_section(arms, learned)
    if "fft" in arms:
        at, unit = f"{amount(reference[0], learned)} learned, 0% kept", COLUMNS[learned][1]
        step = f"{STEP[unit]:g}{unit if unit == '%' else f' {unit}'}"
        lines += [
            "",
            "## Each arm compared with fft",
            "",
            "Kept on average: how much more the arm keeps than fft at equal learning, averaged over the amounts in the "
            "next column, with straight lines between the points of each frontier. Arms with other ranges are not "
            f"ranked by it. Kept at the most: the same at the highest step of {step} that both learn in 95% of the "
            f"draws. Hypervolume: the area that the arm's points dominate above {at}"
            f"{', divided by 100' if learned.endswith('right') else ''}. Difference of two seeds: the mean of its "
            "absolute differences between two runs of the arm that differ in the seed."
            + (
                f" All arms but {' and '.join(finer)} are compared with fft without its finer rates."
                if finer["fft"]
                else ""
            ),
            "",
            *arms_section(arms | ways, learned, reference, finer),
            "",
            "Other measures at equal learning, arm minus fft:",
            "",
            *measures_section(arms | ways, learned, [key for key in keys if key != learned], finer),
        ]
    if {"fft", "hft"} <= arms.keys():
        lines += seeds_section(arms, learned)
    lines += ways_section(ways, learned)
    lines += halves_section(out, content, learned, keys)
    named = "start: the model that all cells start from."
    if "pretrained" in references:  # its rule can be recovered
        named += " pretrained: before it was taught the rule and the people. After ten examples: "
        named += "after {steps} steps on all ten at {learning_rate:g}.".format(**content["recover"])
    lines += [
        "",
        "## Every arm at every learning rate",
        "",
        "Mean ± standard deviation over seeds. Weights moved: norm of the change, relative to the weights' norm. "
        f"{named}",
        "",
        *table(arms, references, ["kept", *keys]),
        "",
    ]
    failures = sorted((out / "cells").glob("*.failed"))
    lines += [f"- {one.name.removesuffix('.json.failed')} failed: {one.read_text()}" for one in failures]
    missing = [arm for arm in dict.fromkeys(cell.arm for cell in todo) if arm not in arms]
    commits = sorted({file["commit"] for file in files})
    versions = ", ".join(f"{name} {number}" for name, number in files[0]["versions"].items())
    by_seed = ", ".join(f"{n} of seed {seed}" for seed, n in Counter(f["cell"]["seed"] for f in files).items())
    lines.append(
        f"{count} ({by_seed})"
        f"{', plus those of the halves' if 'halves' in content else ''}. "
        f"Arms not run: {', '.join(missing) or 'none'}. Commit {', '.join(commits)}. {versions}."
    )
    path.write_text("\n".join(lines) + "\n")
    return said
