"""`hft report`: what it says, one section per way of comparing runs."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from tqdm import tqdm

from hft.config import read_yaml
from hft.errors import HFTError
from hft.machine import say
from hft.planning.forecast import flops_to_fft
from hft.record.scores import answers_of, scores_of
from hft.reporting import figures
from hft.reporting.collect import Collection, Group, LoadedRun, baseline_of, collect, pretrained
from hft.reporting.columns import DRIFT, FACTS, GENERAL, KL, KNOWLEDGE, MEASURES, TASK_LOSS, columns_of
from hft.reporting.compare import compare, curves_of
from hft.reporting.measure import Column, mean_of, parts_of, summarize, unlike
from hft.reporting.page import Cell, Drawing, Row, Section, Table, write_report
from hft.reporting.paper import papers_number
from hft.reporting.statistics import Estimate, equal_learning, estimate, hypervolume

FRONTIERS = ((TASK_LOSS, DRIFT), (TASK_LOSS, FACTS), (KL, DRIFT), (KL, FACTS), (GENERAL, KNOWLEDGE))
ANSWERS = ("reference", "base_answer", "answer")  # keys of a row, in the order of their columns
DRAWN_BLOCKS = ("attention", "mlp", "experts")  # Figure 4
Parts = Iterator[Table | Drawing]  # of a section; those without rows or without a figure do not appear


def report(arguments: Sequence[str]) -> int:
    """Compare runs, as one HTML page and as Markdown."""
    parser = argparse.ArgumentParser(prog="hft report", description="Compare runs, as HTML and as Markdown.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, reset, merge or scored model")
    parser.add_argument("--out", default="report", help="folder for report.html, report.md and figures (%(default)s)")
    parser.add_argument("--report_to", choices=("none", "wandb"), default="none", help="log the page (%(default)s)")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "report.html").exists():
        raise HFTError(f"{out} holds files other than a report; name another folder with --out")

    found = collect(options.runs)
    sections = make_sections(found)
    counts = [(sum(len(group.runs) for group in found.groups), f"runs of {', '.join(found.models)}")]
    counts += [(len(found.extras["matrix.json"]), "sequences of tasks")]
    paths = write_report(", ".join(f"{count} {what}" for count, what in counts if count), sections, out)
    if options.report_to != "none":
        tables = [table for section in sections for table in section.tables]
        say(log_report(out, {name: value for table in tables for name, value in table.numbers.items()}))
    say(*paths)
    return 0


def log_report(out: Path, numbers: dict[str, float]) -> str:
    """Log a report's page to wandb, numbers as its summary and the folder as an artifact, and say where."""
    import wandb

    from hft.runs.tracking import finish, open_run, upload

    run, where = open_run(name=out.resolve().name, job_type="report")
    run.log({"report": wandb.Html((out / "report.html").read_text(encoding="utf-8"), inject=False)})
    run.summary.update(numbers)
    upload(out, kind="report")
    finish()
    return where


def make_sections(found: Collection) -> list[Section]:
    """The sections that have something to show, with the titles and texts of `templates/sections.yaml`."""
    words, sections = read_yaml(Path(__file__).with_name("templates") / "sections.yaml"), []
    with rc_context(**figures.RC):
        for make in SECTIONS:
            parts = list(make(found))
            tables = [part for part in parts if isinstance(part, Table) and part.rows]
            drawings = [part for part in parts if isinstance(part, Drawing) and part.figure]
            if tables or drawings:
                sections.append(Section(**words[make.__name__], tables=tables, drawings=drawings))
    return sections


def selections(found: Collection) -> Parts:
    distinct: dict[tuple[str, ...], LoadedRun] = {}
    for run in (group.first for group in found.groups):
        made = run.manifest
        if made and made.trained_units and (made.frozen_units or made.masks) and (run.folder / "config.json").exists():
            distinct.setdefault((*made.trained_units, str(made.schedule)), run)
    for run in sorted(distinct.values(), key=lambda run: not run.is_ratio)[:13]:
        yield Drawing(f"{run.folder.name}: what trained", figures.selection_picture(run))


def frontiers(found: Collection) -> Parts:
    keeps = found.extras["keep.json"]
    for model, groups in found.models.items():
        ways = [keeps[run.folder.name] for group in groups for run in group.runs if run.folder.name in keeps]
        for x, y in FRONTIERS:
            if x is TASK_LOSS:
                yield frontier_table(model, groups, x, y)
            yield Drawing(f"{model}: {y.name} against {x.name}", figures.frontier(groups, x, y, ways))


def frontier_table(model: str, groups: Sequence[Group], x: Column, y: Column) -> Table:
    """Hypervolume and what is kept at equal learning, an arm per row; no rows unless an arm has two learning rates."""
    curves, title = curves_of(groups, x, y), f"{model}: {y.name} against {x.name}"
    if isinstance(curves, str):
        return Table(title, [""], [[curves]])
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
        more = estimate_cell(found["kept more than fft"], "+") if "kept more than fft" in found else ""
        rows.append([arm, n, estimate_cell(found["hypervolume"]), more])
    head = ["", "n", "hypervolume", Cell("kept more than fft at equal learning", {y.unit: ""})]
    return Table(f"{title}; reference point: {point}", head, rows, numbers)


def estimate_cell(one: Estimate, sign: str = "") -> Cell | str:
    """An estimate and its interval; of a difference, which has a sign, better or worse if the interval says so."""
    if not isfinite(one.low):
        return "too little learned in common"
    kind = "" if not sign or one.low <= 0 <= one.high else "better" if one.value > 0 else "worse"
    return Cell(f"{one.value:{sign}.4g}", {f"{one.low:{sign}.3g} to {one.high:{sign}.3g}": kind})


def scores(found: Collection) -> Parts:
    for model, groups in found.models.items():
        for suite, columns in columns_of(groups).items():
            lines = [(group, baseline_of(group, groups)) for group in groups]
            cells = [(group, [score_cell(group, full, column) for column in columns]) for group, full in lines]
            rows = [[group.label, str(len(group.runs)), *row] for group, row in cells if any(cell.text for cell in row)]
            yield Table(f"{model}: {suite}", ["", "n", *(heading(column, groups) for column in columns)], rows)


def heading(column: Column, groups: Sequence[Group]) -> Cell:
    lines = [column.unit, *([] if column.higher_is_better else ["lower is better"])]
    if len(column.keys) == 1:
        lines[0] = f"{column.keys[0][2]}, {column.unit}"
        runs = [run for group in groups for run in group.runs]
        ns = sorted({score.n for run in runs for _, score in parts_of(column.keys, run.scores)})
        lines.append(f"n = {ns[0]:,}" if len(ns) == 1 else f"n = {ns[0]:,} to {ns[-1]:,}")
    return Cell(column.label, dict.fromkeys(lines, ""))


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
    if baseline and baseline is not group and (found := compare(baseline, group, column)):
        if isinstance(found, str):
            notes[f"not compared with fft: {found}"] = ""
        else:
            rows = f" on {found.difference.rows:,} rows" if found.difference.rows < found.scored else ""
            kind = {None: "", True: "better", False: "worse"}[found.better]
            notes[f"{found.difference.mean:+.{digits}f} to fft{rows}"] = kind
    run = group.first
    if (theirs := papers_number(run.folder, run.model, run.scores, column.keys)) is not None:
        notes[f"paper {theirs:.{digits}f}"] = ""
    return Cell(number.text(digits), notes)


def radars(found: Collection) -> Parts:
    for model, groups in found.models.items():
        drawn = {(key,) for mean in (GENERAL, KNOWLEDGE) for key in mean.keys}
        columns = [column for some in columns_of(groups).values() for column in some if column.keys in drawn]
        whole = [group for group in groups if all(map(group.measure, columns))][:6]
        if len(columns) > 2 and whole:
            yield Drawing(f"{model}: abilities", figures.radar(whole, columns))


def ratios(found: Collection) -> Parts:
    for model, groups in found.models.items():
        for column in MEASURES:
            yield Drawing(f"{model}: {column.name} by trainable fraction", figures.ratio_curves(groups, column))


def variations(found: Collection) -> Parts:
    known = {run.folder.name: group for group in found.groups for run in group.runs}
    for diff in found.extras["diff.json"].values():
        names = {name: known[name].label if name in known else name for name in diff["layers"][0]["change"]}
        arms = {name: known[name].arm if name in known else name for name in names}
        lines = {name: {"label": label} | figures.look(arms[name]) for name, label in names.items()}
        for block in DRAWN_BLOCKS:
            if rows := [row for row in diff["layers"] if row["block"] == block]:
                yield Drawing(f"change of {block} by layer", figures.variation(rows, "layer", lines))
        for name, rows in diff["rounds"].items():
            title = f"change of units by the rounds in which {names[name]} trained them"
            yield Drawing(title, figures.variation(rows, "rounds", lines))


# What a run costs, as it measured it: heading, decimals, number.
COSTS: tuple[tuple[str, int, Callable[[LoadedRun], float | None]], ...] = (
    ("tokens/s", 0, lambda run: run.result and run.result.tokens_per_second),
    ("peak memory, GB", 1, lambda run: run.result and run.result.peak_memory_gb),
    ("optimizer state, MB", 1, lambda run: run.optimizer_bytes and run.optimizer_bytes / 1e6),
)


def cost(found: Collection) -> Parts:
    for model, groups in found.models.items():
        rows = [cost_row(group, baseline_of(group, groups)) for group in groups if group.first.result]
        head = ["", "n", "trains, % of layers", "% of model", "FLOPs, of fft", *(name for name, *_ in COSTS)]
        yield Table(model, head, rows)


def cost_row(group: Group, baseline: Group | None) -> Row:
    fractions, flops = group.first.fractions, flops_to_fft(group.first.folder)
    row = [group.label, str(len(group.runs))]
    row += [f"{100 * fractions[of]:.1f}" if of in fractions else "" for of in ("layers", "model")]
    row.append("" if flops is None else f"{flops:.3f}")
    for name, digits, measure in COSTS:
        number, full = (
            summarize((value, None) for run in (one.runs if one else []) if (value := measure(run)))
            for one in (group, baseline)
        )
        notes = {}
        if number and full and baseline is not group:
            ratio = number.value / full.value
            notes[f"{ratio:.2f} of fft"] = ""
            if name == "tokens/s" and flops and ratio > 1 / flops:
                notes["not the same machine state"] = ""
        row.append(Cell(number.text(digits), notes) if number else "")
    return row


def sequences(found: Collection) -> Parts:
    rows = []
    for name, matrix in found.extras["matrix.json"].items():
        yield Drawing(f"{name}: scores by round", figures.heatmap(matrix))
        yield Drawing(f"{name}: each task over the rounds", figures.task_curves(matrix))
        if matrix["op"]:
            folder, row = matrix["folder"], [name]
            for key in ("op", "bwt"):
                paper = papers_number(folder, pretrained(folder), scores_of(folder), (("trace", key, key),))
                row.append(Cell(f"{matrix[key][-1]:.1f}", {} if paper is None else {f"paper {paper:.1f}": ""}))
            rows.append(row)
    yield Table("After the last round, in %", ["", "OP", "BWT"], rows)


def answers(found: Collection) -> Parts:
    for model, groups in found.models.items():
        prompts: dict[str, dict[str, str]] = {}
        for run in (run for group in groups for run in group.runs):
            for row in answers_of(run.folder):
                said = zip(("reference", "base", run.folder.name), map(row.get, ANSWERS), strict=True)
                prompts.setdefault(row["prompt"], {}).update({name: text for name, text in said if text})
        names = list(dict.fromkeys(name for said in prompts.values() for name in said))
        rows = [[prompt, *(said.get(name, "") for name in names)] for prompt, said in prompts.items()]
        yield Table(f"{model}: answers", ["prompt", *names], rows)


def steps(found: Collection) -> Parts:
    for model, groups in found.models.items():
        losses = [(group, [point for run in group.runs for point in run.losses]) for group in groups]
        yield Drawing(f"{model}: training loss", figures.curves(losses, "training loss"))
        columns = [column for of_suite in columns_of(groups, steps=True).values() for column in of_suite]
        for column in (one for one in columns if one.keys[0][0] != "quick" or one in MEASURES):
            series = [(g, [point for run in g.runs for point in values_over_steps(run, column)]) for g in groups]
            drawing = figures.curves(series, f"{column.name}, {column.unit}")
            yield Drawing(f"{model}: {column.name} over the steps", drawing)


def values_over_steps(run: LoadedRun, column: Column) -> list[tuple[int, float]]:
    """Steps and values of a run's checkpoints and of its end; none if only the end was scored."""
    values = {step: mean_of(parts)[0] for step, found in run.steps.items() if (parts := parts_of(column.keys, found))}
    if values and run.result and (parts := parts_of(column.keys, run.scores)):
        values[run.result.steps] = mean_of(parts)[0]
    return sorted(values.items())


def runs(found: Collection) -> Parts:
    rows: list[Row] = []
    labeled = [(group.label, run) for group in found.groups for run in group.runs]
    for label, run in labeled:
        done, suites = run.result, [f"{name} ({one[0].dtype})" for name, one in run.scores.items()]
        verify = "not finished" if "dataset_name" in run.settings and not done else ""
        if done:
            verify = f"passed, {done.verify.get('identical', 0)} frozen" if done.ok else "failed"
        steps = f"{done.steps:,}" if done else ""
        rows.append([run.folder.name, label, steps, verify, ", ".join(suites)])
    yield Table("", ["run", "group", "steps", "verify", "scores"], rows)


SECTIONS = (selections, frontiers, scores, answers, radars, ratios, variations, cost, sequences, steps, runs)
