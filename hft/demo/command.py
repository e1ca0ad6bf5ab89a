"""`hft fetch` and `hft demo`: a command line in, an exit status out."""

import argparse
import filecmp
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hft.errors import HFTError


def fetch(arguments: Sequence[str]) -> int:
    """Make one of the two models that need no Hub."""
    description = (
        "Make smollm2-135m, which is SmolLM2-135M-Instruct rounded to 4 bits (the Hub has it as released: "
        "HuggingFaceTB/SmolLM2-135M-Instruct), or tiny, a random Llama."
    )
    parser = argparse.ArgumentParser(prog="hft fetch", description=description)
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m or tiny")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="default: models/MODEL")
    options = parser.parse_args(arguments)
    from hft.demo.models import fetch_model

    folder = options.folder or f"models/{options.model}"
    fetch_model(options.model, folder)
    print(f"{options.model} is in {folder}")
    return 0


def demo(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hft demo", description="Write the demo data.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default="data", help="default: data")
    folder = parser.parse_args(arguments).folder
    from hft.demo.data import write_demo_data
    from hft.demo.tasks import write_tasks

    with tempfile.TemporaryDirectory() as made:
        tasks = write_tasks(f"{made}/tasks").items()
        counts = write_demo_data(made) | {f"tasks/{name}": count for name, count in tasks}
        for name in counts:
            if (path := Path(folder, name)).exists() and not filecmp.cmp(path, Path(made, name), shallow=False):
                raise HFTError(f"{path} is not what hft demo writes; name another folder, or remove it")
        shutil.copytree(made, folder, dirs_exist_ok=True)
    for name, count in counts.items():
        print(f"{folder}/{name}: {count:,} rows")
    return 0
