"""JSON Lines: one JSON object a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hft.errors import HFTError, read_text


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a file; blank lines are skipped.

    Raises:
        HFTError: the file cannot be read, or a line is not a JSON object; the sentence names it.
    """
    lines = read_text(path).split("\n")
    return [_object(line, f"{path} is not JSON Lines: line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise HFTError(f"{place}: {error.msg}") from error
    if not isinstance(row, dict):
        raise HFTError(f"{place}: {line.strip():.40} is not an object")
    return row


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = False) -> int:
    """Write rows to a file, whose folder is made if it is not there; returns their number."""
    lines = [json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(lines), encoding="utf-8")
    return len(lines)
