"""The tables of the HFT paper and of CPI-FT as data, from `paper/*.yaml`, and what our runs scored in them."""

from __future__ import annotations

import difflib
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft.config import read_yaml
from hft.errors import HFTError
from hft.record.scores import Scores, scores_of

DATA = Path(__file__).with_name("paper")
# A run that differs from another in its seed only, by what its name adds (`hft.runs.config.run_name`).
SEED_SUFFIX = re.compile(r"(-(selection_)?seed=\d+)+")


@dataclass(frozen=True)
class PaperRow:
    """One model's row of a table."""

    label: str  # as the paper has it
    model: str  # as our recipes call it; the paper's name where we have none
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
    scores: Mapping[str, tuple[str, str, str]]  # suite, task and metric of our score, by column
    notes: tuple[str, ...]

    @property
    def models(self) -> list[str]:
        """The models of its rows, in order."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def suites(self) -> list[str]:
        """The suites of `hft eval` that hold its scores."""
        return list(dict.fromkeys(suite for suite, _, _ in self.scores.values()))

    @property
    def heading(self) -> str:
        """Name, title and section in a line."""
        kind, _, number = self.name.rpartition("-")
        name = {"": "Table", "figure": "Figure", "cpi": "CPI-FT's Table"}[kind]
        return f"{name} {number}: {self.title} ({'section ' if self.section[0].isdigit() else ''}{self.section})"


@dataclass(frozen=True)
class Measured:
    """What our runs scored in one column."""

    value: float  # the mean over the runs
    spread: float | None  # the sample standard deviation over the runs; of one run its standard error, if known
    n: int  # number of runs
    partial: bool = False  # whether any of them was scored with --limit


@functools.cache
def tables() -> dict[str, PaperTable]:
    """All tables by name: those with a number, then the figures and other papers'."""
    runs, harnesses = read_runs(), read_yaml(DATA / "harnesses.yaml")
    entries: dict[str, Any] = {}
    for file in ("tables.yaml", "trace.yaml", "cpi.yaml"):
        entries |= read_yaml(DATA / file)
    return {
        name: _table(name, entries[name], runs, harnesses)
        for name in sorted(entries, key=lambda name: not name.isdigit())
    }


def read_runs() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The model and the commands of each run."""
    content = read_yaml(DATA / "runs.yaml")
    pairs = ((model, run, made) for model, runs in content.items() for run, made in runs.items())
    return {run: (model, (made,) if isinstance(made, str) else tuple(made)) for model, run, made in pairs}


def _table(name: str, entry: dict[str, Any], runs: Mapping[str, Any], harnesses: Mapping[str, Any]) -> PaperTable:
    columns, rows = entry.get("columns"), entry.get("rows")
    if "matrix" in entry:  # of TRACE: tasks by rounds, of one run
        columns = [str(number) for number in range(1, 9)]
        rows = [{"row": task, "run": entry["run"], "values": values} for task, values in entry["matrix"].items()]
    harness = harnesses.get(entry.get("harness"), {})
    scores, notes = harness.get("columns", {}), harness.get("notes", {})
    return PaperTable(
        name=name,
        title=entry["title"],
        section=entry["section"],
        columns=tuple(columns),
        rows=tuple(_row(row, runs) for row in rows),
        means={column: tuple(members) for column, members in entry.get("means", {}).items()},
        scores={column: tuple(scores[column]) for column in columns if column in scores},
        notes=tuple(note for note in (entry.get("note"), *(notes.get(column) for column in columns)) if note),
    )


def _row(entry: dict[str, Any], runs: Mapping[str, tuple[str, tuple[str, ...]]]) -> PaperRow:
    run = entry.get("run")
    model, commands = runs[run] if run else (entry["model"], ())
    folder = f"{run}/{entry['inside']}" if "inside" in entry else run
    return PaperRow(entry["row"], model, tuple(entry["values"]), folder, commands, entry.get("note"))


def find_table(name: str) -> PaperTable:
    """The table of a name; the error for an unknown one names the nearest."""
    if name in tables():
        return tables()[name]
    near = difflib.get_close_matches(name.lower().removeprefix("table").strip(" -"), tables(), n=1, cutoff=0)
    raise HFTError(f"there is no table {name!r}, did you mean {near[0]}? `hft paper` lists all")


def find_rows(table: PaperTable, model: str | None = None) -> list[PaperRow]:
    """The rows of a model, or all of them."""
    if model is None or model in table.models:
        return [row for row in table.rows if model in (None, row.model)]
    [near] = difflib.get_close_matches(model, table.models, n=1, cutoff=0)
    raise HFTError(f"table {table.name} has no rows of {model!r}, did you mean {near}?")


def rows_of_run(run: str) -> list[tuple[PaperTable, PaperRow]]:
    """All rows of a run and of what is inside it, with their tables; `run` is the name of its folder."""
    return [(table, row) for table in tables().values() for row in table.rows if (row.run or "").split("/")[0] == run]


def measure_row(table: PaperTable, row: PaperRow, runs: str | Path = "runs") -> dict[str, Measured]:
    """What we measured for a row, by column: over the row's run and those that differ from it in their seed only."""
    scores = [scores_of(folder) for folder in folders_of(table, row, Path(runs))]
    found, partial = [numbers_of(table, each) for each in scores], set.union(set(), *map(limited_suites, scores))
    return {
        column: replace(summarize(numbers), partial=bool(partial & suites_of(table, column)))
        for column in table.columns
        if (numbers := [each[column] for each in found if column in each])
    }


def limited_suites(scores: Mapping[str, Scores]) -> set[str]:
    """The suites that a run was scored on with --limit."""
    return {suite for suite, each in scores.items() if each.settings.get("limit") is not None}


def suites_of(table: PaperTable, column: str) -> set[str]:
    """The suites that a column's numbers come from."""
    return {table.scores[name][0] for name in table.means.get(column, [column]) if name in table.scores}


def folders_of(table: PaperTable, row: PaperRow, runs: Path) -> list[Path]:
    """The folders of a row: its run, and other seeds of it that are no row of their own."""
    if row.run is None:
        return []
    name, _, inside = row.run.partition("/")
    seeds = [path.name for path in sorted(runs.glob(f"{name}*")) if SEED_SUFFIX.fullmatch(path.name.removeprefix(name))]
    taken = {other.run for other in table.rows}
    found = [row.run, *(run for seed in seeds if (run := str(Path(seed, inside))) not in taken)]
    return [runs / run for run in found]


def numbers_of(table: PaperTable, scores: Mapping[str, Scores]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error of a run in each column that it has scores for, averages included."""
    numbers: dict[str, tuple[float, float | None]] = {}
    for column, (suite, task, metric) in table.scores.items():
        if suite in scores and (score := scores[suite].find(task, metric)):
            numbers[column] = (score.value, score.stderr)
    for column, members in table.means.items():
        if numbers.keys() >= set(members):
            numbers[column] = mean_of([numbers[member] for member in members])
    return numbers


def mean_of(numbers: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean of independent scores, each with its standard error, and that of the mean; None if one is not known."""
    values, errors = zip(*numbers, strict=True)
    error = None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors)
    return statistics.fmean(values), error


def summarize(numbers: Sequence[tuple[float, float | None]]) -> Measured:
    """Values and standard errors of some runs as one number."""
    values = [value for value, _ in numbers]
    spread = statistics.stdev(values) if len(values) > 1 else numbers[0][1]
    return Measured(statistics.fmean(values), spread, len(values))
