"""Classes and functions of a user's own, named FILE.py:NAME in a config."""

import importlib.util
import sys
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
