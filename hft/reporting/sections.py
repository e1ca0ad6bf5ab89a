"""What a report says: one section per way of comparing runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from math import isfinite

import numpy as np
from matplotlib import rc_context
from tqdm import tqdm

from hft.planning.forecast import flops_to_fft
from hft.record.scores import answers_of
from hft.reporting import figures
from hft.reporting.collect import Collection, Group, LoadedRun, baseline_of
from hft.reporting.columns import (
    DRIFT,
    FACTS,
    GENERAL,
    KL,
    KNOWLEDGE,
    MEASURES,
    SUITE_LABELS,
    TASK_LOSS,
    columns_of,
)
from hft.reporting.compare import Comparison, compare
from hft.reporting.figures import Styles
from hft.reporting.frontier import Estimate, curves_of, equal_learning, estimate, hypervolume
from hft.reporting.measure import Column, Measured, mean_of, parts_of, summarize, unlike
from hft.reporting.page import Cell, Drawing, ReportTable, Section
from hft.reporting.paper import ROUNDS, matrix_row, papers_matrix, papers_number

FRONTIERS = ((TASK_LOSS, DRIFT), (TASK_LOSS, FACTS), (KL, DRIFT), (KL, FACTS), (GENERAL, KNOWLEDGE))
ANSWERS = ("reference", "base_answer", "answer")  # keys of a row, in the order of their columns
DRAWN_BLOCKS = ("attention", "mlp", "experts")  # Figure 4
Parts = Iterator[ReportTable | Drawing]  # of a section; those without rows or without a figure do not appear


def make_sections(found: Collection) -> list[Section]:
    """The sections that have something to show; what a function that makes one says of itself is the section's text."""
    styles, sections = figures.styles_of(group.kind for group in found.groups), []
    with rc_context(**figures.RC):
        if drawn := with_selection(found)[:1]:
            sections.append(Section("What trains", opening(drawn[0]), [], [selection_drawing(drawn[0])]))
        for title, make in SECTIONS.items():
            parts = list(make(found, styles))
            tables = [part for part in parts if isinstance(part, ReportTable) and part.rows]
            drawings = [part for part in parts if isinstance(part, Drawing) and part.figure]
            if tables or drawings:
                sections.append(Section(title, " ".join(make.__doc__.split()), tables, drawings))
    return sections


def plain(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def with_selection(found: Collection) -> list[LoadedRun]:
    """Runs that trained a part of their model, first those that drew from each block; of equal selections one."""
    distinct: dict[tuple[str, ...], LoadedRun] = {}
    for run in (group.first for group in found.groups):
        made = run.manifest
        if made and made.trained_units and (made.frozen_units or made.masks) and (run.folder / "config.json").exists():
            distinct.setdefault((*made.trained_units, str(made.schedule)), run)
    return sorted(distinct.values(), key=lambda run: not run.is_ratio)


def opening(run: LoadedRun) -> str:
    text = f"In color what {run.folder.name} trained, in gray what it left as it was."
    if run.manifest.tuned:
        text = f"In color what {run.folder.name} kept of the tuned model, in gray what it put back to the base."
    if run.is_ratio:
        text = f"Half Fine-Tuning trains a random half of every layer and freezes the rest, to forget less. {text}"
    if run.result and run.result.ok:
        text += f" After training, all {run.result.verify['identical']} frozen tensors were bit-identical to the base."
    return text


def selections(found: Collection, styles: Styles) -> Parts:
    """What trained in the first run of each group."""
    for run in with_selection(found)[1:13]:
        yield selection_drawing(run)


def selection_drawing(run: LoadedRun) -> Drawing:
    return Drawing(f"{run.folder.name}: what trained", figures.selection_picture(run))


def frontiers(found: Collection, styles: Styles) -> Parts:
    """Further to the right a model learned more, further up it kept more: axes on which lower is better are turned
    around. A curve per method over its learning rates, the higher the rate the larger the marker; bars are standard
    deviations over seeds; dotted, a run's way back to its base (hft keep). Drift is the loss on general text. If the KL
    to the base alone decided what is forgotten, all methods would lie on one curve against it. In the tables the
    hypervolume is the area below a method's frontier and above the reference point: the base's task loss, and the worst
    that any method here keeps. At equal learning the frontiers are compared where both methods have learned as much, by
    straight lines between learning rates. Intervals are of 95%, over resampled rows and seeds.
    """
    for model, groups in found.models.items():
        ways = [found.keeps[run.folder.name] for g in groups for run in g.runs if run.folder.name in found.keeps]
        for x, y in FRONTIERS:
            if x is TASK_LOSS:
                yield frontier_table(model, groups, x, y)
            yield Drawing(f"{model}: {y.name} against {x.name}", figures.frontier(groups, x, y, styles, ways))


def frontier_table(model: str, groups: Sequence[Group], x: Column, y: Column) -> ReportTable:
    """Hypervolume and what is kept at equal learning, an arm per row; no rows unless an arm has two learning rates."""
    curves, title = curves_of(groups, x, y), f"{model}: {y.name} against {x.name}"
    if isinstance(curves, str):
        return ReportTable(title, plain(""), [plain(curves)])
    worst = min((curve.mean_points[:, 1].min() for curve in curves.values()), default=0)
    side = "below" if (worst < 0) == y.higher_is_better else "above"
    point = f"the base's {x.name} and the worst {y.name}, {abs(worst):.3g} {y.unit} {side} the base's"
    objectives, numbers, rows = {group.arm: group.first.objective for group in groups}, {}, []
    for arm, curve in tqdm(curves.items(), desc="frontiers", unit="method", leave=False):
        found = {"hypervolume": estimate(partial(hypervolume, reference=np.array([0, worst])), curve)}
        full = {g.arm for g in groups if g.first.is_full and g.first.objective == objectives[arm]} & curves.keys()
        if len(full) == 1 and arm not in full:
            found["kept more than fft"] = estimate(equal_learning, curves[full.pop()], curve)
        numbers |= {f"{title}/{arm}/{name}": one.value for name, one in found.items() if isfinite(one.low)}
        (rates, seeds, kept), learned = curve.kept.shape, curve.learned.shape[-1]
        n = f"{rates} rates, {seeds} seeds, {learned:,} and {kept:,} rows"
        more = estimate_cell(found["kept more than fft"], "+") if "kept more than fft" in found else Cell("")
        rows.append([*plain(arm, n), estimate_cell(found["hypervolume"]), more])
    head = [*plain("", "n", "hypervolume"), Cell("kept more than fft at equal learning", {y.unit: ""})]
    return ReportTable(f"{title}; reference point: {point}", head, rows, numbers)


def estimate_cell(one: Estimate, sign: str = "") -> Cell:
    """An estimate and its interval; of a difference, which has a sign, better or worse if the interval says so."""
    if not isfinite(one.low):
        return Cell("too little learned in common")
    kind = "" if not sign or one.low <= 0 <= one.high else "better" if one.value > 0 else "worse"
    return Cell(f"{one.value:{sign}.4g}", {f"{one.low:{sign}.3g} to {one.high:{sign}.3g}": kind})


def scores(found: Collection, styles: Styles) -> Parts:
    """Mean ± standard deviation over n runs that differ in their seeds; for a single run the standard error (se) over
    its rows. Below, the difference to full fine-tuning with the same recipe on the same rows, in color where rows and
    seeds tell the two apart (hft compare); and the paper's number, if it is of the same metric, protocol and pretrained
    model. Numbers that were scored under different conditions are not compared.
    """
    for model, groups in found.models.items():
        for suite, columns in columns_of(groups).items():
            head = [Cell(column.label, dict.fromkeys(column_notes(column, groups), "")) for column in columns]
            rows = []
            for group in groups:
                baseline = baseline_of(group, groups)
                cells = [score_cell(group, baseline, column) for column in columns]
                if any(cell.text for cell in cells):
                    rows.append([*plain(group.label, str(len(group.runs))), *cells])
            yield ReportTable(f"{model}: {SUITE_LABELS.get(suite, suite)}", [*plain("", "n"), *head], rows)


def column_notes(column: Column, groups: Iterable[Group]) -> list[str]:
    """Metric and unit, direction, and rows of a column."""
    lines = [column.unit, *([] if column.higher_is_better else ["lower is better"])]
    if len(column.keys) == 1:
        ns = sorted({part.n for group in groups for run in group.runs for part in parts_of(column.keys, run.scores)})
        lines[0] = f"{column.keys[0][2]}, {column.unit}"
        lines.append(f"n = {ns[0]:,}" if len(ns) == 1 else f"n = {ns[0]:,} to {ns[-1]:,}")
    return lines


def score_cell(group: Group, baseline: Group | None, column: Column) -> Cell:
    """Mean and spread; below, how it was shortened, the paired difference to the baseline and the paper's number."""
    number = group.measure(column)
    if number is None:
        why = unlike(column.keys, [run.scores for run in group.runs])
        return Cell("", {f"no mean: {', '.join(why)}": ""} if why else {})
    digits = 1 if column.unit == "%" else 3
    notes = dict.fromkeys(([f"n = {number.n}"] if number.n < len(group.runs) else []) + number.shortened, "")
    if number.n == 1 and number.spread is not None:
        notes[f"se {number.spread:.{digits}f}"] = ""
    if baseline and baseline is not group:
        notes |= difference_note(group, baseline, column, digits)
    run = group.first
    if (theirs := papers_number(run.folder, run.model, run.scores, column.keys)) is not None:
        notes[f"paper {theirs:.{digits}f}"] = ""
    return Cell(show(number, digits), notes)


def difference_note(group: Group, baseline: Group, column: Column, digits: int) -> dict[str, str]:
    """The difference to the baseline, in color if the rows that both answered tell them apart; or why there is none."""
    found, number, other = compare(baseline, group, column), group.measure(column), baseline.measure(column)
    if isinstance(found, Comparison):
        rows = f" on {found.difference.rows:,} rows" if found.difference.rows < found.scored else ""
        kind = {None: "", True: "better", False: "worse"}[found.better]
        return {f"{found.difference.mean:+.{digits}f} to fft{rows}": kind}
    if why := unlike(column.keys, [run.scores for run in (*baseline.runs, *group.runs)]):
        return {f"not compared with fft: {', '.join(why)}": ""}
    return {f"{number.value - other.value:+.{digits}f} to fft": ""} if other else {}


def radars(found: Collection, styles: Styles) -> Parts:
    """As the paper's Figure 1. Each axis runs from 0 to the best score, which is printed at its end."""
    for model, groups in found.models.items():
        columns = [column for of_suite in columns_of(groups).values() for column in of_suite if len(column.keys) == 1]
        columns = [column for column in columns if column.keys[0] in (*GENERAL.keys, *KNOWLEDGE.keys)]
        whole = [group for group in groups if all(group.measure(column) for column in columns)][:6]
        if len(columns) > 2 and whole:
            yield Drawing(f"{model}: abilities", figures.radar(whole, columns, styles))


def ratios(found: Collection, styles: Styles) -> Parts:
    """As the paper's Figure 3: half fine-tuning at several trainable fractions; dotted, full fine-tuning."""
    for model, groups in found.models.items():
        for column in MEASURES:
            drawing = figures.ratio_curves(groups, column, styles)
            yield Drawing(f"{model}: {column.name} by trainable fraction", drawing)


def variations(found: Collection, styles: Styles) -> Parts:
    """As the paper's Figure 4: the mean absolute change of the elements of a block, by hft diff."""
    known = {run.folder.name: (g.label, styles[g.kind]) for g in found.groups for run in g.runs}
    for diff in found.diffs.values():
        names = list(diff["layers"][0]["change"])
        unknown = figures.styles_of(names)
        models = {name: known.get(name, (name, unknown[name])) for name in names}
        lines = {name: {"label": label} | figures.plot_style(style) for name, (label, style) in models.items()}
        for block in DRAWN_BLOCKS:
            if rows := [row for row in diff["layers"] if row["block"] == block]:
                yield Drawing(f"change of {block} by layer", figures.variation(rows, "layer", lines))
        for name, rows in diff["rounds"].items():
            title = f"change of units by the rounds in which {models[name][0]} trained them"
            yield Drawing(title, figures.variation(rows, "rounds", lines))


def cost(found: Collection, styles: Styles) -> Parts:
    """As the runs measured it; below, relative to full fine-tuning. FLOPs per token are counted, and bound what a run
    can save in time: a speed beyond that bound was measured on another machine, or on one with other work. The
    optimizer state is that in the last checkpoint.
    """
    head = ["", "n", "trains, % of layers", "% of model", "FLOPs, of fft", "tokens/s", "peak memory, GB"]
    head += ["optimizer state, MB"]
    for model, groups in found.models.items():
        trained = [group for group in groups if group.first.result]
        rows = [[*plain(g.label, str(len(g.runs))), *cost_cells(g, baseline_of(g, groups))] for g in trained]
        yield ReportTable(model, plain(*head), rows)


def cost_cells(group: Group, baseline: Group | None) -> list[Cell]:
    fractions, flops = group.first.fractions, flops_to_fft(group.first.folder)
    cells = plain(*(f"{100 * fractions[of]:.1f}" if of in fractions else "" for of in ("layers", "model")))
    cells += plain("" if flops is None else f"{flops:.3f}")
    measures: list[tuple[int, Callable[[LoadedRun], float | None]]] = [
        (0, speed),
        (1, lambda run: run.result and run.result.peak_memory_gb),
        (1, lambda run: run.optimizer_bytes and run.optimizer_bytes / 1e6),
    ]
    for digits, measure in measures:
        number, full = (
            summarize([(value, None) for run in (one.runs if one else []) if (value := measure(run))])
            for one in (group, baseline)
        )
        notes = {}
        if number and full and baseline is not group:
            notes[f"{number.value / full.value:.2f} of fft"] = ""
            if measure is speed and flops and number.value / full.value > 1 / flops:
                notes["not the same machine state"] = ""
        cells.append(Cell(show(number, digits), notes))
    return cells


def speed(run: LoadedRun) -> float | None:
    return run.result and run.result.tokens_per_second


def show(number: Measured | None, digits: int) -> str:
    """`12.3 ± 0.4`, the spread only over several runs; nothing for None."""
    if number is None:
        return ""
    return f"{number.value:,.{digits}f}" + (f" ± {number.spread:,.{digits}f}" if number.n > 1 else "")


def sequences(found: Collection, styles: Styles) -> Parts:
    """The score of each task after each round, in %. OP is the mean over the tasks seen; BWT is the sum of what earlier
    tasks gained or lost since they were learned, over the number of tasks (equation 5).
    """
    rows = []
    for name, matrix in found.matrices.items():
        yield Drawing(f"{name}: scores by round", figures.heatmap(matrix))
        yield Drawing(f"{name}: each task over the rounds", figures.task_curves(matrix))
        if paper := papers_matrix(name, matrix):
            pairs = [(row.label, zip_longest(matrix_row(matrix, row.label), row.values)) for row in paper.rows[:-1]]
            rounds = [[Cell(label), *(round_cell(*pair) for pair in values)] for label, values in pairs]
            yield ReportTable(f"{name}: by round, beside the paper's Table {paper.name}", plain("", *ROUNDS), rounds)
        whole = paper and len(matrix["op"]) == len(ROUNDS)
        last = [row.values[-1] for row in paper.rows[-2:]] if whole else [None, None]
        cells = [round_cell(matrix[key][-1], its) for key, its in zip(("op", "bwt"), last, strict=True) if matrix[key]]
        rows += [[Cell(name), *cells]] if cells else []
    yield ReportTable("After the last round, in %", plain("", "OP", "BWT"), rows)


def round_cell(ours: float | None, paper: float | None) -> Cell:
    return Cell("" if ours is None else f"{ours:.1f}", {} if None in (ours, paper) else {f"paper {paper:.1f}": ""})


def answers(found: Collection, styles: Styles) -> Parts:
    """To the same prompts, by hft generate: greedy, each model with the chat template that it was trained on."""
    for model, groups in found.models.items():
        prompts: dict[str, dict[str, str]] = {}
        for run in (run for group in groups for run in group.runs):
            for row in answers_of(run.folder):
                said = zip(("reference", "base", run.folder.name), map(row.get, ANSWERS), strict=True)
                prompts.setdefault(row["prompt"], {}).update({name: text for name, text in said if text})
        names = list(dict.fromkeys(name for said in prompts.values() for name in said))
        rows = [plain(prompt, *(said.get(name, "") for name in names)) for prompt, said in prompts.items()]
        yield ReportTable(f"{model}: answers", plain("prompt", *names), rows)


def steps(found: Collection, styles: Styles) -> Parts:
    """Means over seeds."""
    for model, groups in found.models.items():
        losses = [(group, [point for run in group.runs for point in run.losses]) for group in groups]
        yield Drawing(f"{model}: training loss", figures.curves(losses, "training loss", styles))
        columns = columns_of(groups, steps=True)
        columns |= {"quick": [column for column in MEASURES if column.suite == "quick"]} if "quick" in columns else {}
        for column in (column for of_suite in columns.values() for column in of_suite):
            series = [(g, [point for run in g.runs for point in values_over_steps(run, column)]) for g in groups]
            drawing = figures.curves(series, f"{column.name}, {column.unit}", styles)
            yield Drawing(f"{model}: {column.name} over the steps", drawing)


def values_over_steps(run: LoadedRun, column: Column) -> list[tuple[int, float]]:
    """Steps and values of a run's checkpoints and of its end; none if only the end was scored."""
    values = {step: mean_of(parts)[0] for step, found in run.steps.items() if (parts := parts_of(column.keys, found))}
    if values and run.result and (parts := parts_of(column.keys, run.scores)):
        values[run.result.steps] = mean_of(parts)[0]
    return sorted(values.items())


def runs(found: Collection, styles: Styles) -> Parts:
    """The folders behind the numbers."""
    rows = []
    for group in found.groups:
        for run in group.runs:
            done, suites = run.result, [f"{name} ({one[0].dtype})" for name, one in run.scores.items()]
            verify = "not finished" if "dataset_name" in run.settings and not done else ""
            if done:
                verify = f"passed, {done.verify.get('identical', 0)} frozen" if done.ok else "failed"
            steps = f"{done.steps:,}" if done else ""
            rows.append(plain(run.folder.name, group.label, steps, verify, ", ".join(suites)))
    yield ReportTable("", plain("run", "group", "steps", "verify", "scores"), rows)


SECTIONS: dict[str, Callable[[Collection, Styles], Parts]] = {
    "Learned and kept": frontiers,
    "Scores": scores,
    "Answers": answers,
    "Abilities": radars,
    "Trainable fraction": ratios,
    "Change of the parameters": variations,
    "Selections": selections,
    "Cost": cost,
    "Sequences": sequences,
    "Over the steps": steps,
    "Runs": runs,
}
