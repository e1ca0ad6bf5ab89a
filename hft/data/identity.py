"""What identifies a dataset, so that a resumed run can tell whether it still reads the same rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder


def fingerprint(name: str, config: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """For local data `files`: size in bytes and SHA-256 of each file by its path in the folder, without hidden files.

    For a Hub id `id`, `config` and `revision`, the last None where the Hub does not say.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return {"files": {path.name: _file(path)}}
    if path.is_dir():
        inside = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
        visible = {key: file for key, file in inside.items() if not any(part.startswith(".") for part in key.parts)}
        return {"files": {key.as_posix(): _file(file) for key, file in visible.items()}}
    return {"id": name, "config": config, "revision": load_dataset_builder(name, config, revision=revision).hash}


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
