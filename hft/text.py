"""Tables as text and as Markdown."""

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest


def aligned(rows: Iterable[Sequence[str] | str], left: int = 1) -> str:
    """Rows of cells in columns, the first `left` flush left, the others right; a string is a line by itself."""
    rows = list(rows)
    columns = zip_longest(*(row for row in rows if not isinstance(row, str)), fillvalue="")
    widths = [max(map(len, column)) for column in columns]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=False))
        return "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in cells)

    return "\n".join((row if isinstance(row, str) else line(row)).rstrip() for row in rows)


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table; the first one is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, also in a cell of a table."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", text).replace("\n", "<br>")
