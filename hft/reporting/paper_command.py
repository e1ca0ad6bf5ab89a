"""`hft paper`: the paper's tables with the commands that reproduce them and our scores, as text or Markdown."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from hft.machine import say
from hft.reporting.measure import Measured
from hft.reporting.paper import PaperRow, PaperTable, find_rows, find_table, measure_row, tables
from hft.text import aligned, markdown

# Of each row what we measured, by column.
Ours = Sequence[dict[str, Measured]]


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
    rows = find_rows(table, options.model)
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
    digits = table.digits
    lines = {row.label: ["-" if v is None else f"{v:.{d}f}" for v, d in zip(row.values, digits, strict=True)]}
    if mine:
        counts = sorted({one.n for one in mine.values()})
        several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        pairs = [(mine.get(column), d) for column, d in zip(table.columns, digits, strict=True)]
        lines[f"ours, n = {several}"] = [our_cell(one, d, usual) if one else "" for one, d in pairs]
    return lines


def our_cell(one: Measured, digits: int, usual: Mapping[str, Any]) -> str:
    spread = "" if one.spread is None else f"±{one.spread:.{digits}f}"
    return f"{one.value:.{digits}f}{spread}" + "*" * bool(unusual(one, usual))


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
