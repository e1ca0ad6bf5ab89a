"""`hft fetch` and `hft demo`: a command line in, an exit status out."""

import argparse
import filecmp
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hft.errors import HFTError


def fetch(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hft fetch", description="Make one of the two models that need no Hub.")
    about = "smollm2-135m, which is HuggingFaceTB/SmolLM2-135M-Instruct rounded to 4 bits, or tiny, a random Llama"
    parser.add_argument("model", metavar="MODEL", help=about)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="default: models/MODEL")
    options = parser.parse_args(arguments)
    from hft.demo.models import fetch_model

    folder = options.folder or f"models/{options.model}"
    fetch_model(options.model, folder)
    print(f"{options.model} is in {folder}")
    return 0


def demo(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hft demo", description="Write the demo data.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="default: data")
    folder = parser.parse_args(arguments).folder or "data"
    from hft.demo.data import write_demo_data
    from hft.demo.tasks import write_tasks

    with tempfile.TemporaryDirectory() as made:
        write_demo_data(made)
        write_tasks(f"{made}/tasks")
        paths = {path: Path(folder, path.relative_to(made)) for path in sorted(Path(made).rglob("*.json*"))}
        for path, target in paths.items():
            if target.exists() and not filecmp.cmp(path, target, shallow=False):
                raise HFTError(f"{target} is not what hft demo writes; name another folder, or remove it")
        shutil.copytree(made, folder, dirs_exist_ok=True)
    print(*(f"{path}" for path in paths.values()), sep="\n")
    return 0
