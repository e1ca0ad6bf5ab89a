"""The tables of the HFT paper and of CPI-FT as data, from `paper/*.yaml`, and what our runs scored in them."""

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft.config import read_yaml
from hft.errors import HFTError
from hft.record.scores import scores_of
from hft.reporting.measure import Key, Measured, measure

DATA = Path(__file__).with_name("paper")
# What `hft.runs.config.run_name` adds to the name of a run with other seeds.
SEED_IN_NAME = re.compile(r"-(selection_|data_)?seed=\d+")


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
    scores: Mapping[str, Key]  # where our score is, by column
    notes: tuple[str, ...]

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
    runs, harnesses = read_runs(), read_yaml(DATA / "harnesses.yaml")
    entries: dict[str, Any] = {}
    for file in ("tables.yaml", "trace.yaml", "cpi.yaml"):
        entries |= read_yaml(DATA / file)
    names = sorted(entries, key=lambda name: not name.isdigit())
    return {name: _table(name, entries[name], runs, harnesses) for name in names}


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
    if name in tables():
        return tables()[name]
    near = difflib.get_close_matches(name.lower().removeprefix("table").strip(" -"), tables(), n=1, cutoff=0)
    raise HFTError(f"unknown table {name!r}, did you mean {near[0]}? `hft paper` lists all")


def find_rows(table: PaperTable, model: str | None = None) -> list[PaperRow]:
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
    found = {column: measure(table.keys(column), scores) for column in table.columns}
    return {column: measured for column, measured in found.items() if measured}


def folders_of(table: PaperTable, row: PaperRow, runs: Path) -> list[Path]:
    """The folders of a row: its run, and other seeds of it that are no row of their own."""
    if row.run is None:
        return []
    name, _, inside = row.run.partition("/")
    near = [path.name for path in sorted(runs.glob(f"{name}*"))]
    seeds = [other for other in near if not SEED_IN_NAME.sub("", other.removeprefix(name))]
    taken = {other.run for other in table.rows}
    return [runs / row.run, *(runs / seed / inside for seed in seeds if str(Path(seed, inside)) not in taken)]
