"""`hft paper`: the paper's tables with the commands that reproduce them and our scores, as text or Markdown."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hft.errors import HFTError
from hft.machine import say
from hft.reporting.measure import Measured
from hft.reporting.paper import (
    PaperRow,
    PaperTable,
    find_rows,
    find_table,
    measure_row,
    read_runs,
    rows_of_run,
    strangers,
    tables,
)
from hft.text import aligned, markdown

# Between these lines of a file stands what `--update` makes.
START_MARK = "<!-- made by `hft paper --update` from hft/reporting/paper/ -->"
END_MARK = "<!-- end of what `hft paper --update` made -->"


def paper(arguments: Sequence[str]) -> int:
    description = "Print a table of the paper: commands, the paper's numbers, and what your runs scored."
    parser = argparse.ArgumentParser(prog="hft paper", description=description)
    parser.add_argument("table", metavar="TABLE", nargs="?", help="such as 5, figure-1 or cpi-1; without it, a list")
    parser.add_argument("--model", help="only the rows of this model, such as llama2-7b")
    parser.add_argument("--runs", default="runs", help="the folder with your runs (default: runs)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--update", metavar="FILE", help="write all commands into a Markdown file, between its markers")
    options = parser.parse_args(arguments)
    if options.update:
        update(Path(options.update))
    elif options.table:
        table = find_table(options.table)
        rows = find_rows(table, options.model)
        measured = [measure_row(table, row, options.runs) for row in rows]
        print(as_markdown(table, rows, measured) if options.markdown else as_text(table, rows, measured))
        say(*dict.fromkeys(why for row in rows for why in strangers(table, row, options.runs)))
    else:
        print(aligned([(name, f"{table.title} [{', '.join(table.models)}]") for name, table in tables().items()], 2))
    return 0


def as_text(table: PaperTable, rows: Sequence[PaperRow], measured: Sequence[dict[str, Measured]]) -> str:
    """Some rows of a table in aligned columns below their commands: the paper's numbers, and ours if there are any."""
    lines: list[Sequence[str] | str] = [table.heading, "", ["", *table.columns]]
    usual = usual_conditions(measured)
    pairs = zip(rows, measured, strict=True)
    for commands, group in groupby(pairs, key=lambda pair: pair[0].commands):
        lines += ["", *(commands or ["no command of ours:"])]
        for row, mine in group:
            lines += [[f"  {name}", *cells] for name, cells in numbers(table, row, mine, usual).items()]
            lines += [f"    note: {row.note}"] if row.note else []
    notes = [textwrap.fill(note, 120) for note in remarks(table, measured)]
    return "\n".join([aligned(lines), "", *notes]).rstrip()


def as_markdown(table: PaperTable, rows: Sequence[PaperRow], measured: Sequence[dict[str, Measured]]) -> str:
    lines, usual = [["", "command", *table.columns]], usual_conditions(measured)
    for row, mine in zip(rows, measured, strict=True):
        commands = [one_after_another(row.commands), ""]
        lines += [[name, commands.pop(0), *cells] for name, cells in numbers(table, row, mine, usual).items()]
    notes = [f"{row.label}: {row.note}" for row in rows if row.note]
    notes = [f"- {note}" for note in [*notes, *remarks(table, measured)]]
    return "\n".join([f"**{table.heading}**", "", markdown(lines), "", *notes]).rstrip()


def one_after_another(commands: Sequence[str]) -> str:
    return ", then ".join(f"`{command}`" for command in commands)


def numbers(
    table: PaperTable, row: PaperRow, mine: dict[str, Measured], usual: Mapping[str, Any]
) -> dict[str, list[str]]:
    """The lines of a row: the paper's numbers, and ours if there are any, marked unless under the usual conditions."""
    digits = [decimals(table, index) for index in range(len(table.columns))]
    lines = {row.label: ["-" if v is None else f"{v:.{d}f}" for v, d in zip(row.values, digits, strict=True)]}
    if mine:
        counts = sorted({one.n for one in mine.values()})
        several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        pairs = zip(table.columns, digits, strict=True)
        cells = [_measured(mine[column], d, usual) if column in mine else "" for column, d in pairs]
        lines[f"ours, n = {several}"] = cells
    return lines


def _measured(one: Measured, digits: int, usual: Mapping[str, Any]) -> str:
    text = f"{one.value:.{digits}f}" + ("" if one.spread is None else f"±{one.spread:.{digits}f}")
    return text + "*" * bool(unusual(one, usual))


def usual_conditions(measured: Sequence[dict[str, Measured]]) -> Mapping[str, Any]:
    """Those of most of our numbers that are by the benchmark's own settings."""
    found = [one.conditions for mine in measured for one in mine.values() if not one.shortened]
    return max(found, key=found.count, default={})


def unusual(one: Measured, usual: Mapping[str, Any]) -> list[str]:
    """The conditions of a number that are not the usual ones."""
    differ = [key for key in one.conditions.keys() & usual.keys() if one.conditions[key] != usual[key]]
    return sorted({*one.shortened, *(f"{key} {one.conditions[key]}" for key in differ)})


def decimals(table: PaperTable, column: int) -> int:
    """How many the paper prints in a column."""
    return max(
        len(str(float(row.values[column])).partition(".")[2]) for row in table.rows if row.values[column] is not None
    )


def remarks(table: PaperTable, measured: Sequence[dict[str, Measured]]) -> list[str]:
    if any(measured):
        mine = ["ours: mean ± standard deviation over n runs that differ in their seed; ± standard error where n = 1"]
        usual = usual_conditions(measured)
        if others := sorted({what for row in measured for one in row.values() for what in unusual(one, usual)}):
            mine.append(f"* scored under other conditions than the benchmark's or most of ours: {', '.join(others)}")
    else:
        code = {suite for suite, _, metric in table.scores.values() if metric.startswith("pass@")}
        suites = dict.fromkeys(suite for suite, *_ in table.scores.values() if suite != "trace")  # scored as it runs
        flags = [f"--suite {suite}{' --allow_code' if suite in code else ''}" for suite in suites]
        score = " and ".join(f"`hft eval RUN {flag}`" for flag in flags)
        mine = [f"None of these runs is scored yet; to score one: {score}."] if score else []
    return [*table.notes, *mine]


def update(path: Path) -> None:
    """Write the commands and numbers of all runs into a Markdown file, between its markers."""
    try:
        before, start, rest = path.read_text(encoding="utf-8").partition(START_MARK)
    except OSError as error:
        raise HFTError(f"cannot read {path}: {error.strerror}") from error
    _, end, after = rest.partition(END_MARK)
    if not (start and end):
        raise HFTError(f"{path} has no place for the commands: add the lines {START_MARK} and {END_MARK}")
    path.write_text(f"{before}{START_MARK}\n\n{all_runs()}\n\n{END_MARK}{after}", encoding="utf-8")


def all_runs() -> str:
    """For each model a Markdown table of its runs: commands, the paper's numbers, and in which tables."""
    runs, parts = read_runs(), []
    for model in dict.fromkeys(model for model, _ in runs.values()):
        rows = [["command", "the paper", "tables"]]
        for run, (owner, commands) in runs.items():
            if owner == model:
                found = [(table, row) for table, row in rows_of_run(run) if not table.name.startswith("figure")]
                names = dict.fromkeys(table.name for table, _ in found)
                rows.append([one_after_another(commands), "; ".join(headlines(found)), ", ".join(names)])
        parts.append(f"### {model}\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def headlines(found: Sequence[tuple[PaperTable, PaperRow]]) -> list[str]:
    """What tables have for a run: averages, or all columns where there are only a few."""
    values: dict[str, list[str]] = {}
    for table, row in found:
        if not (table.means or len(table.columns) <= 6):
            continue
        cells = dict(zip(table.columns, numbers(table, row, {}, {})[row.label], strict=True))
        for column in table.means or table.columns:
            name = f"mean of {len(table.means[column])}" if table.means else column
            values.setdefault(name, []).append(cells[column])
    return [f"{name}: {', '.join(dict.fromkeys(cells))}" for name, cells in values.items()]
