"""Files that a config names: what is in them, and code as FILE.py:NAME."""

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hft.errors import HFTError


def load_from_file(spec: str, kind: str) -> Any:
    """The object that FILE.py:NAME names, or None if the file has no such name; `kind` is the key that names it."""
    path, _, name = spec.rpartition(":")
    if not (Path(path).is_file() and path.endswith(".py")):
        raise HFTError(f"{kind} {spec}: {path} is not a Python file")
    found = importlib.util.spec_from_file_location(str(Path(path).resolve()), path)
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # where dataclasses look annotations up
    found.loader.exec_module(module)
    return getattr(module, name, None)


def with_files(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with SHA-256 of the files that it names, such as data, and own code as FILE.py:NAME."""
    paths = {k: Path(v.rpartition(":")[0] if ".py:" in v else v) for k, v in record.items() if isinstance(v, str)}
    files = {key: path for key, path in paths.items() if path.suffix and path.is_file()}
    return {**record} | {f"file of {key}": file_digest(path) for key, path in files.items()}


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes; a file that was replaced is read again, also by `cp -p`, which keeps all but ctime."""
    stat = Path(path).stat()
    return _file_digest(str(Path(path).absolute()), (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, version: tuple[int, ...]) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
