"""`hft paper`: the tables of the HFT paper and of CPI-FT, from `paper/*.yaml`, with what our runs scored in them."""

import argparse
import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from hft.config import read_yaml
from hft.errors import HFTError, did_you_mean
from hft.evaluation.suites import PROTOCOLS
from hft.machine import say
from hft.record.scores import Scores, SuiteScores, scores_of
from hft.reporting.collect import EXTRAS, SEED_IN_NAME, pretrained, read_json
from hft.reporting.measure import Key, Measured, measure, parts_of, summarize
from hft.text import aligned, markdown

DATA = Path(__file__).with_name("paper")
MATRIX = "matrix.json"  # of a sequence of tasks
ROUNDS = tuple(map(str, range(1, 9)))  # of TRACE
read_once = functools.cache(read_yaml)

# Of each row what we measured, by column.
Ours = Sequence[dict[str, Measured]]


@dataclass(frozen=True)
class PaperRow:
    """One model's row of a table."""

    label: str  # as the paper has it
    model: str  # as our recipes call it; the paper's name where we have none
    base: str  # the pretrained model that our run goes back to, by the last part of its name
    values: tuple[float | None, ...]  # one per column, as printed; None for a dash
    run: str | None = None  # the folder below `runs/` with our scores; None if we have no command for it
    commands: tuple[str, ...] = ()  # what makes that folder, from nothing
    note: str | None = None  # where the paper contradicts itself, or a value looks wrong


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper."""

    name: str  # its number, such as `5`; `figure-1` and the like; `cpi-1` for CPI-FT
    title: str  # ours
    section: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    means: Mapping[str, tuple[str, ...]]  # columns that are averages, with those that they average
    scores: Mapping[str, Key]  # where our score is, by column
    notes: tuple[str, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it has TRACE's tasks by rounds."""
        return self.columns == ROUNDS

    @property
    def tasks(self) -> list[str]:
        """The tasks of a matrix, in the order in which they are learned."""
        return [row.label for row in self.rows if row.label not in ("OP", "BWT")]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))

    def keys(self, column: str) -> tuple[Key, ...]:
        """The scores that a column shows or averages; none if we have no counterpart."""
        names = self.means.get(column, (column,))
        return tuple(self.scores[name] for name in names) if self.scores.keys() >= set(names) else ()

    @property
    def heading(self) -> str:
        kind, _, number = self.name.rpartition("-")
        name = {"": "Table", "figure": "Figure", "cpi": "CPI-FT's Table"}[kind]
        return f"{name} {number}: {self.title} ({'section ' if self.section[0].isdigit() else ''}{self.section})"


@functools.cache
def tables() -> dict[str, PaperTable]:
    """All tables by name: those with a number, then the figures and other papers'."""
    harnesses = read_yaml(DATA / "harnesses.yaml")
    files = [read_yaml(DATA / f"{name}.yaml") for name in ("tables", "trace", "cpi")]
    entries = {name: entry for file in files for name, entry in file.items()}
    return {name: table_of(name, entries[name], harnesses) for name in sorted(entries, key=lambda n: not n.isdigit())}


def table_of(name: str, entry: dict[str, Any], harnesses: Mapping[str, Any]) -> PaperTable:
    columns, rows = entry.get("columns"), entry.get("rows")
    if "matrix" in entry:  # of TRACE: tasks by rounds, of one run
        columns = ROUNDS
        rows = [{"row": task, "run": entry["run"], "values": values} for task, values in entry["matrix"].items()]
    harness = harnesses.get(entry.get("harness"), {})
    scores, notes = harness.get("columns", {}), harness.get("notes", {})
    return PaperTable(
        name=name,
        title=entry["title"],
        section=entry["section"],
        columns=tuple(columns),
        rows=tuple(map(row_of, rows)),
        means={column: tuple(members) for column, members in entry.get("means", {}).items()},
        scores={column: tuple(scores[column]) for column in columns if column in scores},
        notes=tuple(note for note in (entry.get("note"), *map(notes.get, columns)) if note),
    )


def row_of(entry: dict[str, Any]) -> PaperRow:
    run = entry.get("run")
    model, commands = read_runs()[run] if run else (entry["model"], ())
    cached = re.fullmatch(r"models--.+--(.+)", run or "")  # a model of the Hub as it is
    base = cached[1] if cached else read_once(DATA / "bases.yaml").get(model, "")
    folder = f"{run}/{entry['inside']}" if "inside" in entry else run
    return PaperRow(entry["row"], model, base, tuple(entry["values"]), folder, commands, entry.get("note"))


@functools.cache
def read_runs() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The model and the commands of each run."""
    content = read_yaml(DATA / "runs.yaml")
    pairs = ((model, run, made) for model, runs in content.items() for run, made in runs.items())
    return {run: (model, (made,) if isinstance(made, str) else tuple(made)) for model, run, made in pairs}


def find_table(name: str) -> PaperTable:
    if name in tables():
        return tables()[name]
    hint = did_you_mean(name.lower().removeprefix("table").strip(" -"), tables(), ";")
    raise HFTError(f"unknown table {name!r}{hint} `hft paper` lists all")


def papers_number(folder: Path, base: str, scores: Mapping[str, SuiteScores], keys: Sequence[Key]) -> float | None:
    """What the paper has for some scores of a run, by the names of its folder and of its pretrained model."""
    parts = parts_of(keys, scores)
    if not parts or not all(has_protocol(one) for one, _ in parts):
        return None
    inside = f"{SEED_IN_NAME.sub('', folder.parent.name)}/{folder.name}"
    for name in (folder.name, SEED_IN_NAME.sub("", folder.name), inside):
        for table in tables().values():
            columns = [number for number, column in enumerate(table.columns) if table.keys(column) == tuple(keys)]
            for row in table.rows if columns else ():
                if (row.run, row.base) == (name, base):
                    return row.values[columns[0]]
    return None


def matrix_row(matrix: Mapping[str, Any], label: str) -> list[float | None]:
    """After each round the score of a task that is learned, or OP; for BWT it is that after the last of TRACE's."""
    if label in ("OP", "BWT"):
        return [v if label == "OP" or t == len(ROUNDS) - 1 else None for t, v in enumerate(matrix[label.lower()])]
    task, after = matrix["tasks"].index(label), matrix["scores"][len(matrix["scores"]) - len(matrix["op"]) :]
    return [None if t < task else scores[task] for t, scores in enumerate(after)]


def has_protocol(scores: Scores) -> bool:
    """Whether scores were measured by the protocol, or on the tasks, that the paper's tables are set beside."""
    if scores.suite == "trace":
        return scores.settings.get("tasks") == find_table("24").tasks
    return scores.suite not in PROTOCOLS or scores.settings.get("protocol") == PROTOCOLS[scores.suite]


def measure_row(table: PaperTable, row: PaperRow, runs: str | Path = "runs") -> tuple[dict[str, Measured], list[str]]:
    """What we measured for a row, by column, over the row's run and those that differ from it in their seed only; and
    why what else is in their folders does not stand beside the paper's numbers.
    """
    scores, rounds, said = [], [], []
    for folder in filter(Path.exists, folders_of(table, row, Path(runs))):
        if (base := pretrained(folder)) != row.base:
            said.append(f"{folder} is not shown: it goes back to {base}, the paper's to {row.base}")
            continue
        for suite, found in (saved := scores_of(folder)).items():
            saved[suite] = SuiteScores(filter(has_protocol, found))
            if len(saved[suite]) < len(found):
                said.append(f"{folder}: scores of {suite} by another protocol or tasks are not shown")
        scores.append(saved)
        matrix = read_json(folder / MATRIX, EXTRAS[MATRIX]) if table.is_matrix and (folder / MATRIX).exists() else {}
        rounds += [matrix_row(matrix, row.label)] if matrix.get("tasks") == table.tasks else []
    if table.is_matrix:
        values = ([(value, None) for value in some if value is not None] for some in zip_longest(*rounds))
        measured = dict(zip(ROUNDS, map(summarize, values), strict=False))
    else:
        measured = {column: measure(keys, scores) for column in table.columns if (keys := table.keys(column))}
    return {column: one for column, one in measured.items() if one}, said


def folders_of(table: PaperTable, row: PaperRow, runs: Path) -> list[Path]:
    """The folders of a row: its run, and other seeds of it that are no row of their own."""
    if row.run is None:
        return []
    name, _, inside = row.run.partition("/")
    near = [path.name for path in sorted(runs.glob(f"{name}*"))]
    seeds = [other for other in near if not SEED_IN_NAME.sub("", other.removeprefix(name))]
    taken = {other.run for other in table.rows}
    return [runs / row.run, *(runs / seed / inside for seed in seeds if str(Path(seed, inside)) not in taken)]


def paper(arguments: Sequence[str]) -> int:
    description = "Print a table of the paper: commands, the paper's numbers, and what your runs scored."
    parser = argparse.ArgumentParser(prog="hft paper", description=description)
    parser.add_argument("table", metavar="TABLE", nargs="?", help="such as 5, figure-1 or cpi-1; without it, a list")
    parser.add_argument("--model", help="only the rows of this model, such as llama2-7b")
    parser.add_argument("--runs", default="runs", help="the folder with your runs (default: runs)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if not options.table:
        print(aligned([(name, f"{table.title} [{', '.join(table.models)}]") for name, table in tables().items()], 2))
        return 0
    table = find_table(options.table)
    rows = [row for row in table.rows if options.model in (None, row.model)]
    if not rows:
        raise HFTError(f"table {table.name} has no rows of {options.model!r}, only of {', '.join(table.models)}")
    ours, reasons = zip(*(measure_row(table, row, options.runs) for row in rows), strict=True)
    print(as_markdown(table, rows, ours) if options.markdown else as_text(table, rows, ours))
    say(*dict.fromkeys(why for said in reasons for why in said))
    return 0


def as_text(table: PaperTable, rows: Sequence[PaperRow], ours: Ours) -> str:
    """Some rows of a table in aligned columns below their commands: the paper's numbers, and ours if there are any."""
    lines: list[Sequence[str] | str] = [table.heading, "", ["", *table.columns]]
    usual = usual_conditions(ours)
    for commands, group in groupby(zip(rows, ours, strict=True), key=lambda pair: pair[0].commands):
        lines += ["", *(commands or ["no command of ours:"])]
        for row, mine in group:
            lines += [[f"  {name}", *cells] for name, cells in numbers(table, row, mine, usual).items()]
            lines += [f"    note: {row.note}"] if row.note else []
    return "\n".join([aligned(lines), "", *(textwrap.fill(note, 120) for note in remarks(table, ours))]).rstrip()


def as_markdown(table: PaperTable, rows: Sequence[PaperRow], ours: Ours) -> str:
    lines, usual = [["", "command", *table.columns]], usual_conditions(ours)
    for row, mine in zip(rows, ours, strict=True):
        commands = [", then ".join(f"`{command}`" for command in row.commands), ""]
        lines += [[name, commands.pop(0), *cells] for name, cells in numbers(table, row, mine, usual).items()]
    notes = [f"{row.label}: {row.note}" for row in rows if row.note] + remarks(table, ours)
    return "\n".join([f"**{table.heading}**", "", markdown(lines), "", *(f"- {note}" for note in notes)]).rstrip()


def numbers(
    table: PaperTable, row: PaperRow, mine: dict[str, Measured], usual: Mapping[str, Any]
) -> dict[str, list[str]]:
    """The lines of a row: the paper's numbers, and ours if there are any, marked unless under the usual conditions."""
    columns = zip(*(one.values for one in table.rows), strict=True)
    digits = [max(len(str(float(v)).partition(".")[2]) for v in some if v is not None) for some in columns]
    lines = {row.label: ["-" if v is None else f"{v:.{d}f}" for v, d in zip(row.values, digits, strict=True)]}
    if mine:
        counts = sorted({one.n for one in mine.values()})
        several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        pairs = [(mine.get(column), d) for column, d in zip(table.columns, digits, strict=True)]
        cells = lines[f"ours, n = {several}"] = []
        for one, d in pairs:
            spread = "" if one is None or one.spread is None else f"±{one.spread:.{d}f}"
            cells.append(f"{one.value:.{d}f}{spread}{'*' if unusual(one, usual) else ''}" if one else "")
    return lines


def usual_conditions(ours: Ours) -> Mapping[str, Any]:
    """Those of most of our numbers that are by the benchmark's own settings."""
    found = [one.conditions for mine in ours for one in mine.values() if not one.shortened]
    return max(found, key=found.count, default={})


def unusual(one: Measured, usual: Mapping[str, Any]) -> list[str]:
    differ = [key for key in one.conditions.keys() & usual.keys() if one.conditions[key] != usual[key]]
    return sorted({*one.shortened, *(f"{key} {one.conditions[key]}" for key in differ)})


def remarks(table: PaperTable, ours: Ours) -> list[str]:
    if any(ours):
        mine = ["ours: mean ± standard deviation over n runs that differ in their seed; ± standard error where n = 1"]
        usual = usual_conditions(ours)
        if others := sorted({what for row in ours for one in row.values() for what in unusual(one, usual)}):
            mine.append(f"* scored under other conditions than the benchmark's or most of ours: {', '.join(others)}")
    else:
        code = {suite for suite, _, metric in table.scores.values() if metric.startswith("pass@")}
        suites = dict.fromkeys(suite for suite, *_ in table.scores.values() if suite != "trace")  # scored as it runs
        flags = [f"--suite {suite}{' --allow_code' if suite in code else ''}" for suite in suites]
        score = " and ".join(f"`hft eval RUN {flag}`" for flag in flags)
        mine = [f"None of these runs is scored yet; to score one: {score}."] if score else []
    return [*table.notes, *mine]
