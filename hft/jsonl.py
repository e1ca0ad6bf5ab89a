"""JSON Lines: one JSON object a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hft.errors import HFTError, read_text


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a file, a line each; blank lines are skipped."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise HFTError(f"{path} is not JSON Lines: line {number}: {error.msg}") from error
        if line.strip() and not isinstance(rows[-1], dict):
            raise HFTError(f"{path} is not JSON Lines: line {number}: {line.strip():.40} is not an object")
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = False) -> int:
    """Write rows to a file, whose folder is made if it is not there; returns their number."""
    lines = [json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(lines), encoding="utf-8")
    return len(lines)
