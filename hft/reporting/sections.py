"""What a report says: a section for each thing that runs can be compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from matplotlib import rc_context

from hft.planning.forecast import flops_to_fft
from hft.record.scores import Score
from hft.reporting import figures
from hft.reporting.collect import SEED_IN_NAME, Collection, Column, Group, LoadedRun, baseline_of
from hft.reporting.figures import Styles
from hft.reporting.page import Cell, Drawing, ReportTable, Section
from hft.reporting.paper import Measured, rows_of_run, summarize

# Suites and tasks in the order of their tables, by the names that people know; others follow under their own.
SUITE_LABELS = {"quick": "task, drift and facts", "general": "general ability", "knowledge": "basic knowledge"}
TASK_LABELS = {
    "task": "task loss",
    "drift": "drift",
    "kl": "KL to base",
    "facts": "facts",
    "mmlu_0shot": "MMLU 0-shot",
    "gsm8k": "GSM8K",
    "bbh": "BBH",
    "tydiqa": "TyDiQA",
    "truthfulqa": "TruthfulQA",
    "humaneval": "HumanEval",
    "mmlu_5shot": "MMLU 5-shot",
    "nq_open": "NQ",
    "triviaqa": "TriviaQA",
    "hotpotqa": "HotpotQA",
    "ifeval": "IFEval",
    "mbpp": "MBPP",
    "math": "MATH",
    "hellaswag": "HellaSwag",
}
GENERAL_TASKS = ("mmlu_0shot", "gsm8k", "bbh", "tydiqa", "truthfulqa", "humaneval")  # Table 1
KNOWLEDGE_TASKS = ("nq_open", "triviaqa", "hotpotqa")  # Table 2
TASK_LOSS = Column("quick", (("task", "loss"),), "task loss", "nats/token", False)
DRIFT = Column("quick", (("drift", "loss"),), "drift", "nats/token", False)
KL = Column("quick", (("kl", "kl"),), "KL to base", "nats/token", False)
FACTS = Column("quick", (("facts", "acc_centered"),), "facts, centered")
GENERAL = Column("general", tuple((task, None) for task in GENERAL_TASKS), "mean of 6")
KNOWLEDGE = Column("knowledge", tuple((task, None) for task in KNOWLEDGE_TASKS), "mean of 3")
MEASURES = (TASK_LOSS, DRIFT, KL, FACTS, GENERAL, KNOWLEDGE)
FRONTIERS = ((TASK_LOSS, DRIFT), (TASK_LOSS, FACTS), (KL, DRIFT), (KL, FACTS), (GENERAL, KNOWLEDGE))
Points = list[tuple[int, float]]  # steps and values
DRAWN_BLOCKS = ("attention", "mlp", "experts")  # Figure 4


def make_sections(found: Collection) -> list[Section]:
    """All sections, also those that have nothing to show."""
    styles = figures.styles_of(group.kind for group in found.groups)
    with rc_context(figures.RC):
        return [
            opening(found),
            frontiers(found, styles),
            scores(found),
            radars(found, styles),
            ratios(found, styles),
            variations(found, styles),
            selections(found),
            cost(found),
            sequences(found),
            steps(found, styles),
            runs(found),
        ]


def opening(found: Collection) -> Section:
    """One selection as a picture, and what it shows."""
    drawn = with_selection(found)[:1]
    if not drawn:
        return Section("What trains", "")
    run, name = drawn[0], drawn[0].folder.name
    text = f"In color what {name} trained, in gray what it left as it was."
    if run.manifest.tuned:
        text = f"In color what {name} kept of the tuned model, in gray what it put back to the base."
    if run.is_ratio:
        text = f"Half Fine-Tuning trains a random half of every layer and freezes the rest, to forget less. {text}"
    if run.result and run.result.ok:
        text += f" After training, all {run.result.verify['identical']} frozen tensors were bit-identical to the base."
    return Section("What trains", text, drawings=[selection_drawing(run)])


def selections(found: Collection) -> Section:
    drawn = [selection_drawing(run) for run in with_selection(found)[1:13]]
    return Section("Selections", "What trained in the first run of each group.", drawings=drawn)


def with_selection(found: Collection) -> list[LoadedRun]:
    """Runs that trained a part of their model, first those that drew from each block; of equal selections one."""
    distinct: dict[tuple[str, ...], LoadedRun] = {}
    for run in (group.first for group in found.groups):
        made = run.manifest
        if made and made.trained_units and (made.frozen_units or made.masks) and (run.folder / "config.json").exists():
            distinct.setdefault((*made.trained_units, str(made.schedule)), run)
    return sorted(distinct.values(), key=lambda run: not run.is_ratio)


def selection_drawing(run: LoadedRun) -> Drawing:
    return Drawing(f"{run.folder.name}: what trained", figures.selection_picture(run))


def frontiers(found: Collection, styles: Styles) -> Section:
    drawings = [
        Drawing(f"{model}: {y.name} against {x.name}", figure)
        for model, groups in found.models.items()
        for x, y in FRONTIERS
        if (figure := figures.frontier(groups, x, y, styles))
    ]
    text = (
        "Further to the right a model learned more, further up it kept more: axes on which lower is better are turned "
        "around. A curve per method over its learning rates, the higher the rate the larger the marker; bars are "
        "standard deviations over seeds. Drift is the loss on general text. If the KL to the base alone decided what "
        "is forgotten, all methods would lie on one curve against it."
    )
    return Section("Learned and kept", text, drawings=drawings)


def scores(found: Collection) -> Section:
    """A table for each suite of each model."""
    tables = []
    for model, groups in found.models.items():
        for suite, columns in columns_of(groups).items():
            head = [Cell(column.label, [(line, "") for line in column_notes(column, groups)]) for column in columns]
            rows = []
            for group in groups:
                baseline = baseline_of(group, groups)
                cells = [score_cell(group, baseline, column) for column in columns]
                if any(cell.text for cell in cells):
                    rows.append([Cell(group.label), Cell(str(len(group.runs))), *cells])
            tables.append(ReportTable(f"{model}: {SUITE_LABELS.get(suite, suite)}", [Cell(""), Cell("n"), *head], rows))
    text = (
        "Mean ± standard deviation over n runs that differ in their seeds; for a single run the standard error (se) "
        "over its rows. Below, the difference to full fine-tuning with the same recipe, and the paper's number."
    )
    return Section("Scores", text, tables)


def column_notes(column: Column, groups: Iterable[Group]) -> list[str]:
    """Metric and unit, direction, and rows of a column."""
    lines = [column.unit, *([] if column.higher_is_better else ["lower is better"])]
    if len(column.tasks) == 1:
        parts = [part for group in groups for run in group.runs for part in column.parts(run.scores)]
        ns = sorted({part.n for part in parts})
        lines[0] = f"{parts[0].metric}, {column.unit}"
        lines.append(f"n = {ns[0]:,}" if len(ns) == 1 else f"n = {ns[0]:,} to {ns[-1]:,}")
    return lines


def score_cell(group: Group, baseline: Group | None, column: Column) -> Cell:
    """Mean and spread; below, the difference to the baseline and the paper's number."""
    number = column.measured(group)
    if number is None:
        return Cell("")
    digits, notes = (1 if column.unit == "%" else 3), []
    if number.n < len(group.runs):
        notes.append((f"n = {number.n}", ""))
    if number.n == 1 and number.spread is not None:
        notes.append((f"se {number.spread:.{digits}f}", ""))
    other = column.measured(baseline) if baseline and baseline is not group else None
    if other:
        change = round(number.value, digits) - round(other.value, digits)
        kind = "better" if (change > 0) == column.higher_is_better else "worse"
        notes.append((f"{change:+.{digits}f} to fft", kind if abs(change) > 10**-digits / 2 else ""))
    if (theirs := papers_number(group.first, column)) is not None:
        notes.append((f"paper {theirs:.{digits}f}", ""))
    return Cell(show(number, digits), notes)


def papers_number(run: LoadedRun, column: Column) -> float | None:
    """What the paper has for a run, known by the name of its folder; None if nothing."""
    wanted = {(column.suite, task) for task, _ in column.tasks}
    for table, row in rows_of_run(SEED_IN_NAME.sub("", run.folder.name)):
        means = {name: {table.scores[one][:2] for one in members} for name, members in table.means.items()}
        for name, tasks in ({name: {score[:2]} for name, score in table.scores.items()} | means).items():
            if tasks == wanted and "/" not in row.run:  # not of something inside the folder
                return row.values[table.columns.index(name)]
    return None


def columns_of(groups: Iterable[Group], *, steps: bool = False) -> dict[str, list[Column]]:
    """The columns of each suite, in the order of their tables; last the paper's means, where their tasks are there.

    With `steps` those of the checkpoints' scores.
    """
    runs = [run for group in groups for run in group.runs]
    scored = [one for run in runs for one in (run.steps.values() if steps else [run.scores])]
    found: dict[str, dict[tuple[str, str], Score]] = {}
    for suite, scores in (item for one in scored for item in one.items()):
        for score in scores.scores:
            found.setdefault(suite, {}).setdefault((score.task, score.metric), score)
    columns: dict[str, list[Column]] = {}
    for suite in sorted(found, key=lambda name: (rank(name, SUITE_LABELS), name)):
        for (task, metric), score in sorted(found[suite].items(), key=lambda item: rank(item[0][0], TASK_LABELS)):
            label = TASK_LABELS.get(task, task.replace("_", " "))
            if sum(other == task for other, _ in found[suite]) > 1:
                label += f", {metric.removeprefix('acc_').replace('_', ' ')}"
            column = Column(suite, ((task, metric),), label, score.unit, score.higher_is_better)
            columns.setdefault(suite, []).append(column)
        means = [mean for mean in (GENERAL, KNOWLEDGE) if mean.suite == suite]
        columns[suite] += [mean for mean in means if any(mean.number(one) for one in scored)]
    return columns


def rank(name: str, names: Iterable[str]) -> int:
    """The index of a name among others; after all of them if it is not there."""
    return next((index for index, other in enumerate(names) if other == name), 1000)


def radars(found: Collection, styles: Styles) -> Section:
    drawings = []
    for model, groups in found.models.items():
        columns = [one for suite in columns_of(groups).values() for one in suite if len(one.tasks) == 1]
        columns = [one for one in columns if one.tasks[0][0] in (*GENERAL_TASKS, *KNOWLEDGE_TASKS)]
        whole = [group for group in groups if all(column.measured(group) for column in columns)][:6]
        if len(columns) > 2 and whole:
            drawings.append(Drawing(f"{model}: abilities", figures.radar(whole, columns, styles)))
    text = "As the paper's Figure 1. Each axis runs from 0 to the best score, which is printed at its end."
    return Section("Abilities", text, drawings=drawings)


def ratios(found: Collection, styles: Styles) -> Section:
    drawings = [
        Drawing(f"{model}: {column.name} by trainable fraction", figure)
        for model, groups in found.models.items()
        for column in MEASURES
        if (figure := figures.ratio_curves(groups, column, styles))
    ]
    text = "As the paper's Figure 3: half fine-tuning at several trainable fractions; dotted, full fine-tuning."
    return Section("Trainable fraction", text, drawings=drawings)


def variations(found: Collection, styles: Styles) -> Section:
    known = {run.folder.name: (g.label, styles[g.kind]) for g in found.groups for run in g.runs}
    drawings = []
    for diff in found.diffs.values():
        names = list(diff["layers"][0]["change"])
        models = {name: (name, style) for name, style in figures.styles_of(names).items() if name in names} | known
        models = {name: models[name] for name in names}
        for block in DRAWN_BLOCKS:
            if rows := [row for row in diff["layers"] if row["block"] == block]:
                drawings.append(Drawing(f"change of {block} by layer", figures.variation(rows, "layer", models)))
        for name, rows in diff["rounds"].items():
            title = f"change of units by the rounds in which {models[name][0]} trained them"
            drawings.append(Drawing(title, figures.variation(rows, "rounds", models)))
    text = "As the paper's Figure 4: the mean absolute change of the elements of a block, by hft diff."
    return Section("Change of the parameters", text, drawings=drawings)


def cost(found: Collection) -> Section:
    head = ["", "n", "trains, % of layers", "% of model", "FLOPs, of fft", "tokens/s", "peak memory, GB"]
    head += ["optimizer state, MB"]
    tables = []
    for model, groups in found.models.items():
        trained = [group for group in groups if group.first.result]
        rows = [[Cell(g.label), Cell(str(len(g.runs))), *cost_cells(g, baseline_of(g, groups))] for g in trained]
        tables += [ReportTable(model, [Cell(text) for text in head], rows)] if rows else []
    text = (
        "As the runs measured it; below, relative to full fine-tuning. FLOPs per token are counted, and bound what a "
        "run can save in time. Speeds compare only on the same machine. The optimizer state is that in the last "
        "checkpoint."
    )
    return Section("Cost", text, tables)


def cost_cells(group: Group, baseline: Group | None) -> list[Cell]:
    fractions = [group.first.fractions.get(of) for of in ("layers", "model")]
    cells = [Cell("" if fraction is None else f"{100 * fraction:.1f}") for fraction in fractions]
    flops = flops_to_fft(group.first.folder)
    cells.append(Cell("" if flops is None else f"{flops:.3f}"))
    measures: list[tuple[int, Callable[[LoadedRun], float | None]]] = [
        (0, lambda run: run.result and run.result.tokens_per_second),
        (1, lambda run: run.result and run.result.peak_memory_gb),
        (1, lambda run: run.optimizer_bytes and run.optimizer_bytes / 1e6),
    ]
    for digits, measure in measures:
        number = over_runs(group, measure)
        full = over_runs(baseline, measure) if baseline and baseline is not group else None
        notes = [(f"{number.value / full.value:.2f} of fft", "")] if number and full else []
        cells.append(Cell(show(number, digits), notes))
    return cells


def over_runs(group: Group, measure: Callable[[LoadedRun], float | None]) -> Measured | None:
    """Mean and spread over the runs of a group for which something was measured."""
    numbers = [(value, None) for run in group.runs if (value := measure(run))]
    return summarize(numbers) if numbers else None


def show(number: Measured | None, digits: int) -> str:
    """`12.3 ± 0.4`, the spread only over several runs; nothing for None."""
    if number is None:
        return ""
    return f"{number.value:,.{digits}f}" + (f" ± {number.spread:,.{digits}f}" if number.n > 1 else "")


def sequences(found: Collection) -> Section:
    """OP and BWT of each sequence of tasks beside the paper's, and the scores behind them (section 4.2)."""
    drawings, rows = [], []
    for name, matrix in found.matrices.items():
        drawings.append(Drawing(f"{name}: scores by round", figures.heatmap(matrix)))
        drawings.append(Drawing(f"{name}: each task over the rounds", figures.task_curves(matrix)))
        papers = {column: value for column, value in papers_sequence(name).items() if value is not None}
        cells = [
            Cell(f"{matrix[column.lower()][-1]:.1f}", [(f"paper {papers[column]}", "")] if column in papers else [])
            for column in ("OP", "BWT")
            if matrix[column.lower()]
        ]
        rows += [[Cell(name), *cells]] if cells else []
    tables = [ReportTable("After the last round, in %", [Cell(""), Cell("OP"), Cell("BWT")], rows)] if rows else []
    text = (
        "The score of each task after each round, in %. OP is the mean over the tasks seen; BWT is the sum of what "
        "earlier tasks gained or lost since they were learned, over the number of tasks (equation 5)."
    )
    return Section("Sequences", text, tables, drawings)


def papers_sequence(name: str) -> dict[str, float | None]:
    """The paper's OP and BWT of a sequence, if it has its name."""
    found = [dict(zip(table.columns, row.values, strict=True)) for table, row in rows_of_run(name)]
    return next((values for values in found if "OP" in values), {})


def steps(found: Collection, styles: Styles) -> Section:
    """Training loss, and scores of checkpoints (Tables 20 and 21)."""
    drawings = []

    def draw(
        title: str, ylabel: str, groups: list[Group], points: Callable[[LoadedRun], list[tuple[int, float]]]
    ) -> None:
        series = [(group, [point for run in group.runs for point in points(run)]) for group in groups]
        if series := [(group, found) for group, found in series if found]:
            drawings.append(Drawing(title, figures.curves(series, ylabel, styles)))

    for model, groups in found.models.items():
        draw(f"{model}: training loss", "training loss", groups, lambda run: run.losses)
        columns = columns_of(groups, steps=True)
        columns |= {"quick": [column for column in MEASURES if column.suite == "quick"]} if "quick" in columns else {}
        for column in (column for suite in columns.values() for column in suite):
            title, ylabel = f"{model}: {column.name} over the steps", f"{column.name}, {column.unit}"
            draw(title, ylabel, groups, lambda run, column=column: values_over_steps(run, column))
    return Section("Over the steps", "Means over seeds.", drawings=drawings)


def values_over_steps(run: LoadedRun, column: Column) -> Points:
    """The values of a run's checkpoints and of its end; none if only the end was scored."""
    scored = {step: number for step, scores in run.steps.items() if (number := column.number(scores))}
    if scored and run.result and (last := column.number(run.scores)):
        scored[run.result.steps] = last
    return [(step, value) for step, (value, _) in sorted(scored.items())]


def runs(found: Collection) -> Section:
    """Which folders the groups are made of, and whether each was verified."""
    rows = []
    for group in found.groups:
        for run in group.runs:
            done, suites = run.result, [f"{name} ({one.dtype})" for name, one in run.scores.items()]
            verify = "not finished" if "dataset_name" in run.settings and not done else ""
            if done:
                verify = f"passed, {done.verify.get('identical', 0)} frozen" if done.ok else "failed"
            texts = [run.folder.name, group.label, f"{done.steps:,}" if done else "", verify, ", ".join(suites)]
            rows.append([Cell(text) for text in texts])
    head = [Cell(text) for text in ("run", "group", "steps", "verify", "scores")]
    return Section("Runs", "The folders behind the numbers.", [ReportTable("", head, rows)] if rows else [])
