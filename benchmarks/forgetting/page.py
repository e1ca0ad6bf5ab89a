"""The page of a folder of cells, and its picture. They can be written again whenever there are more cells."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from run import Cell, load
from scipy.stats import t as student

# Columns of a cell's rows that the page shows: key, heading, unit.
COLUMNS = {
    "new.right": ("new task right", "%"),
    "new.loss": ("new task loss", ""),
    "rule.right": ("old rule right", "%"),
    "recovered.rule.right": ("old rule after ten examples", "%"),
    "people.right": ("people right", "%"),
    "facts.right": ("facts right", "%"),
    "text.loss": ("text loss", ""),
    "text.kl": ("KL on text", ""),
    "new.kl": ("KL on the new task", ""),
}
Points = dict[str, dict[float, dict[int, dict[str, float]]]]  # arm -> learning rate -> seed -> column -> mean over rows


def summary(cell: dict[str, Any]) -> dict[str, float]:
    """Means over rows, with shares in percent, and how far the weights moved."""
    means = {key: statistics.fmean(rows) * (100 if key.endswith("right") else 1) for key, rows in cell["rows"].items()}
    kept = [key for key in ("rule.right", "people.right", "facts.right") if key in means]
    return means | {"kept": statistics.fmean(means[key] for key in kept), "distance": cell["distance"]["all"]}


def read(out: Path, todo: list[Cell]) -> tuple[Points, list[dict[str, Any]]]:
    """The cells of the grid that are there, by arm, rate and seed; and the files they are from."""
    points: Points = {}
    files = []
    for cell in todo:
        path = out / "cells" / f"{cell.name}.json.gz"
        if cell.seed == cell.selection and path.exists():
            files.append(load(path))
            points.setdefault(cell.arm, {}).setdefault(cell.learning_rate, {})[cell.seed] = summary(files[-1])
    return points, files


def best_rate(rates: dict[float, dict[int, dict[str, float]]], learned: str) -> float:
    """The learning rate at which an arm learns the most, on average over its seeds."""
    sign = 1 if learned.endswith("right") else -1
    return max(rates, key=lambda rate: sign * statistics.fmean(one[learned] for one in rates[rate].values()))


def at_equal_learning(a: dict, b: dict, seed: int, learned: str, kept: str) -> float | None:
    """Difference a - b in what is kept where both have learned as much: the most that both of them reach.

    What is kept is interpolated over the learning rates up to the one that learns the most.
    """
    sign = 1 if learned.endswith("right") else -1
    curves = []
    for rates in (a, b):
        points = [rates[rate][seed] for rate in sorted(rates) if seed in rates[rate]]
        if not points:
            return None
        top = max(range(len(points)), key=lambda index: sign * points[index][learned])
        curves.append(sorted((sign * point[learned], point[kept]) for point in points[: top + 1]))
    level = min(curve[-1][0] for curve in curves)
    here, there = (float(np.interp(level, *zip(*curve, strict=True))) for curve in curves)
    return here - there


def interval(values: list[float]) -> tuple[str, str]:
    """Mean and 95% t interval over seeds as text, and whether it is more, less, or not told apart."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return f"{mean:+.2f}", "n = 1"
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    word = "not told apart" if abs(mean) <= half else "more" if mean > 0 else "less"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]", word


def beside_fft(points: Points, learned: str, keys: list[str]) -> tuple[list[str], list[str]]:
    """What each arm keeps beside FFT where both have learned as much: sentences, and a table of all measures."""
    names = {"kept": "kept, points"} | {key: name for key, (name, _) in COLUMNS.items()}
    sentences, lines = [], [f"| arm | n | {' | '.join(names[key] for key in keys)} |", "| --- " * (len(keys) + 2) + "|"]
    for arm in (arm for arm in points if arm != "fft" and "fft" in points):
        seeds = sorted({seed for rates in points[arm].values() for seed in rates})
        cells = []
        for key in keys:
            found = [at_equal_learning(points[arm], points["fft"], seed, learned, key) for seed in seeds]
            found = [value for value in found if value is not None]
            text, word = interval(found) if found else ("", "not compared")
            cells.append(text)
            if key == "kept":
                sentences.append(
                    f"- {arm} against fft at equal learning: {word}, {text} points kept (n = {len(found)})."
                )
        lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
    return sentences, lines


def table(points: Points, references: dict[str, dict[str, float]], columns: dict[str, tuple[str, str]]) -> list[str]:
    """Every arm at every rate: mean and standard deviation over seeds."""
    heads = [f"{name}, {unit}" if unit else name for name, unit in columns.values()]
    heads = ["arm", "learning rate", "n", *heads, "weights moved"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, its in references.items():
        lines.append(f"| {name} | | | {' | '.join(f'{its[k]:.3g}' if k in its else '' for k in columns)} | |")
    for arm, rates in points.items():
        for rate, seeds in sorted(rates.items()):
            shown = []
            for key in (*columns, "distance"):
                values = [one[key] for one in seeds.values() if key in one]
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                shown.append(f"{statistics.fmean(values):.3g}{spread}" if values else "")
            lines.append(f"| {arm} | {rate:g} | {len(seeds)} | {' | '.join(shown)} |")
    return lines


def frontier(
    points: Points, start: dict[str, float], learned: str, keys: dict[str, tuple[str, str]], path: Path
) -> None:
    """What is kept against what is learned: a curve per arm over its learning rates, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(keys), 5.4), layout="constrained")
    styles = [f"C{n % 10}" for n in range(len(points))]
    for axes, (key, (name, unit)) in zip(np.atleast_1d(figure.subplots(1, len(keys))), keys.items(), strict=True):
        for n, (arm, rates) in enumerate(points.items()):
            curve = [
                [statistics.fmean(one[column] for one in rates[rate].values()) for column in (learned, key)]
                for rate in sorted(rates)
            ]
            wide = {"linewidth": 2.5} if arm in ("fft", "hft") else {"linewidth": 1, "alpha": 0.8}
            axes.plot(*zip(*curve, strict=True), marker="ov^sDPX"[n // 10], color=styles[n], label=arm, **wide)
        if key in start:
            axes.axhline(start[key], color="gray", linestyle=":", label="before")
        better = "up" if key.endswith("right") or key == "kept" else "down"
        axes.set(xlabel=f"learned: {COLUMNS[learned][0]}" + (", %" if learned.endswith("right") else ", nats/token"))
        axes.set(ylabel=f"{name}{f', {unit}' if unit else ', nats/token'} (better is {better})")
        if better == "down":
            axes.invert_yaxis()
        if not learned.endswith("right"):
            axes.invert_xaxis()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Up and to the right is better; each curve is one method over its learning rates")
    figure.savefig(path, dpi=110)


def halves(out: Path, content: dict[str, Any]) -> list[str]:
    """How much the choice of the half changes, beside how much the order of the rows does."""
    from run import halves as cells_of

    groups: dict[str, list[dict[str, float]]] = {"selections": [], "orders": []}
    for cell in cells_of(content):
        path = out / "cells" / f"{cell.name}.json.gz"
        if path.exists():
            its = summary(load(path))
            groups["selections"] += [its] if cell.seed == 0 else []
            groups["orders"] += [its] if cell.selection == 0 else []
    groups = {name: list({tuple(row.items()): row for row in rows}.values()) for name, rows in groups.items()}
    if min(map(len, groups.values())) < 2:
        return []
    lines = ["", "## Does the half matter?", "", "Standard deviations of hft at one learning rate:", ""]
    lines += ["| | n | " + " | ".join(COLUMNS[key][0] for key in COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name, rows in groups.items():
        spread = [f"{statistics.stdev(row[key] for row in rows):.2g}" if key in rows[0] else "" for key in COLUMNS]
        lines.append(f"| other {name} | {len(rows)} | {' | '.join(spread)} |")
    return lines


def write_page(out: Path, content: dict[str, Any], todo: list[Cell], path: Path, command: str) -> str:
    """Write a page and a picture beside it, and return the verdict."""
    points, files = read(out, todo)
    if not files:
        return "no cells yet"
    others = {name: out / "cells" / f"{name}.json.gz" for name in ("pretrained", "start")}
    references = {name: summary(load(cell)) for name, cell in others.items() if cell.exists()}
    columns = {key: value for key, value in COLUMNS.items() if any(key in file["rows"] for file in files)}
    learned = content.get("learned", "new.right")
    kinds = [key.partition(".")[0] for key in ("rule.right", "people.right", "facts.right") if key in columns]
    kept = {"kept": (f"kept: right answers, mean of {', '.join(kinds)}", "%")}
    shown = kept | {key: columns[key] for key in ("text.loss", "new.kl") if key in columns}
    frontier(points, references.get("start", {}), learned, shown, path.with_suffix(".png"))
    compared = [key for key in ("kept", *columns) if key not in ("new.right", "new.loss")]
    sentences, differences = beside_fft(points, learned, compared)
    best = []
    for arm, rates in points.items():
        top = best_rate(rates, learned)
        inside = min(rates) < top < max(rates)
        best.append(f"{arm} {top:g}" + ("" if inside else " (at the edge of its rates)"))
    arms = dict.fromkeys(cell.arm for cell in todo)
    missing = [arm for arm in arms if arm not in points]
    failed = {
        path.name.removesuffix(".json.failed"): path.read_text() for path in sorted((out / "cells").glob("*.failed"))
    }
    commits = sorted({file["commit"] for file in files})
    versions = ", ".join(f"{name} {value}" for name, value in files[0]["versions"].items())
    lines = [
        "# What each method learns and what it forgets",
        "",
        f"    {command}",
        "",
        *sentences,
        "",
        f"![What is kept against what is learned]({path.stem}.png)",
        "",
        f"Learned is {columns[learned][0]} after training; kept is what the model could before. Mean ± standard",
        "deviation over seeds of data order and selection. At equal learning: interpolated over an arm's rates,",
        "up to the most that both arms reach, paired by seed, with a 95% t interval over seeds.",
        "",
        "Difference from fft at equal learning, with its interval:",
        "",
        *differences,
        "",
        "## Every arm at every learning rate",
        "",
        *table(points, references, columns),
        "",
        "Learning rate at which each arm learns the most: " + ", ".join(best) + ".",
        *halves(out, content),
        "",
        *(f"- {name} failed: {why}" for name, why in failed.items()),
        f"{len(files)} cells of {len(todo)}. Arms not run yet: {', '.join(missing) or 'none'}. "
        f"Commit {', '.join(commits)}. {versions}.",
    ]
    path.write_text("\n".join(lines) + "\n")
    return "\n".join(sentences)
