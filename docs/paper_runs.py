"""Writes all runs into recipes/README.md, with commands and the paper's numbers: `python docs/paper_runs.py [FILE]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hft.reporting.paper import PaperRow, PaperTable, numbers, read_runs, tables
from hft.text import markdown

# Between these lines of the file stands what is made here.
START = "<!-- made by docs/paper_runs.py from hft/reporting/paper/ -->"
END = "<!-- end of what docs/paper_runs.py made -->"


def update(path: Path) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{START}\n\n{all_runs()}\n\n{END}{after}", encoding="utf-8")


def all_runs() -> str:
    """For each model a Markdown table of its runs: commands, the paper's numbers, and in which tables."""
    runs, parts = read_runs(), []
    all_rows = [(t, row) for name, t in tables().items() if not name.startswith("figure") for row in t.rows if row.run]
    for model in dict.fromkeys(model for model, _ in runs.values()):
        rows = [["command", "the paper", "tables"]]
        for run, (owner, commands) in runs.items():
            if owner == model:
                found = [(table, row) for table, row in all_rows if row.run.split("/")[0] == run]
                names = dict.fromkeys(table.name for table, _ in found)
                chain = ", then ".join(f"`{command}`" for command in commands)
                rows.append([chain, "; ".join(headlines(found)), ", ".join(names)])
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


if __name__ == "__main__":
    update(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "recipes/README.md")
