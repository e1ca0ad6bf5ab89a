"""What each method learns and what it forgets: `make forgetting SIZE=mini|smollm2|...`, or this file and a SIZE.

Trains one model per cell (an arm, a learning rate, a seed), measures it row by row, and keeps a file per cell. Any
number of processes may work on one folder, one killed at any moment costs its cell, and rerunning the command resumes.
The page is written from the cells that are there.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from hft.errors import HFTError, Stopped

HERE = Path(__file__).parent
SIZES = sorted(path.stem for path in HERE.glob("*.yaml"))
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")
# Keys that say which cells there are and what the page shows of them, not what a cell is.
GRID = ("about", "arms", "learning_rates", "rates_of", "finer", "seeds", "halves", "keep", "quick", "named")


@dataclass(frozen=True)
class Cell:
    """One run: `seed` orders the rows, `selection` draws what trains."""

    arm: str
    learning_rate: float
    seed: int
    selection: int

    @property
    def name(self) -> str:
        more = f"-selection={self.selection}" if self.selection != self.seed else ""
        return f"{self.arm}-lr={self.learning_rate:g}-seed={self.seed}{more}"


class Keep(Cell):
    """A run of which the way back to the start model is measured: start + a x (trained - start)."""

    @property
    def name(self) -> str:
        return f"{super().name}-keep"


def read_size(size: str) -> dict[str, Any]:
    """What a size's file says; one that names a `setting` has its start model, and the keys that it does not give.

    A key of `train` that it sets to null is left out.
    """
    content = yaml.safe_load((HERE / f"{size}.yaml").read_text())
    if "setting" not in content:
        return content
    its = read_size(content["setting"])
    shared = {key: its[key] for key in ("model", "make", "limit", "recover") if key in its}
    train = {key: value for key, value in (its["train"] | content["train"]).items() if value is not None}
    return shared | content | {"train": train}


def cells(content: dict[str, Any], *, quick: bool) -> Iterator[Cell]:
    """All cells, whole seeds first; those of `halves` follow the second seed, those of `keep` come last."""
    grid = content | content["quick"] if quick else content
    for seed, arm in itertools.product(grid["seeds"], grid["arms"]):
        if seed == 2 and arm == next(iter(grid["arms"])) and not quick:
            yield from halves(content)
        rates = grid.get("rates_of", {}).get(arm, grid["learning_rates"])
        rates = grid["learning_rates"] if quick else [*rates, *grid.get("finer", {}).get(arm, ())]
        yield from (Cell(arm, float(rate), seed, seed) for rate in rates)
    if (its := grid.get("keep")) and not quick:
        for seed, arm, rate in itertools.product(grid["seeds"], its["arms"], its["learning_rates"]):
            yield Keep(arm, float(rate), seed, seed)


def halves(content: dict[str, Any]) -> Iterator[Cell]:
    """Ten selections with one order of the rows, and ten orders with one selection."""
    its = content.get("halves")
    for n in range(its["count"] if its else 0):
        yield Cell(its["arm"], float(its["learning_rate"]), 0, n)
        yield Cell(its["arm"], float(its["learning_rate"]), n, 0)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do what a lock file stands for; the system frees the lock of a process that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold a lock file once no other process does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(path: Path, content: dict[str, Any]) -> None:
    """Write gzipped JSON, whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with gzip.open(part, "wt") as file:
        json.dump(content, file)
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt") as file:
        return json.load(file)


def about(content: dict[str, Any]) -> dict[str, Any]:
    """What every cell records of where it comes from."""
    git = ("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    commit = subprocess.run(["git", *git], capture_output=True, text=True, cwd=HERE, check=True).stdout.strip()
    return {
        "settings": {key: value for key, value in content.items() if key not in GRID},
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
    }


class Bench:
    """A setting with its start model loaded: what a cell needs beside its own keys."""

    def __init__(self, content: dict[str, Any], size: str, out: Path):
        from measure import before

        self.content, self.out = content, out
        self.setting, self.objective = (
            importlib.import_module(content.get("setting", size)),
            content.get("objective", "sft"),
        )
        with waiting_for(out / "start.lock"):
            self.start = self.setting.make_start(content, out)
        self.model = model_of(self.start)
        self.rows, self.examples = self.setting.probes(content, self.start, out)
        self.pairs = self.setting.pairs(content, self.start, out) if self.objective == "dpo" else []
        self.before = {kind: before(self.model, its) for kind, its in self.rows.items() if not its[0].others}
        self.pairs_before = before(self.model, self.pairs) if self.pairs else {}
        self.about = about(content)

    def measured(self, model: Any) -> dict[str, Any]:
        from measure import distance, measure, preferences, recovered

        recover = {key: value for key, value in self.content["recover"].items() if key != "examples"}
        old = {kind: self.rows[kind] for kind in self.setting.RECOVERED}
        rows = measure(model, self.rows, self.before)
        rows |= recovered(model, self.examples, old, **recover) if self.examples else {}
        rows |= preferences(model, self.pairs, self.pairs_before) if self.pairs else {}
        return {"rows": rows, "distance": distance(model, self.model)}

    def way_back(self, model: Any) -> dict[str, Any]:
        """What models between the start model (alpha 0) and a trained one (1) measure."""
        from measure import between

        alphas = [n / (self.content["keep"]["points"] - 1) for n in range(self.content["keep"]["points"])]
        return {"way": [{"alpha": a} | self.measured(between(self.model, model, a)) for a in alphas]}

    def reference(self, name: str, folder: Path) -> None:
        """A file like a cell's of a model that no cell trained."""
        if not (path := self.out / "cells" / f"{name}.json.gz").exists():
            save(path, {"cell": {"arm": name}} | self.measured(model_of(folder)) | self.about)

    def run(self, cell: Cell, path: Path) -> None:
        """Train and measure a cell in a folder that is deleted afterwards; what is printed goes to a log."""
        from hft.runs.config import load_config
        from hft.runs.plan import make_plan
        from hft.runs.train import train

        began = time.time()
        arm = dict(self.content["arms"][cell.arm])
        methods, replay = arm.pop("method"), arm.pop("replay", 0.0)
        keys = self.content["train"] | {"model_name_or_path": str(self.start), "seed": cell.seed}
        keys |= self.setting.data_keys(self.out, replay, self.objective)
        # Flags win over a method's file; the learning rate is then the rate itself, not an adapter's multiple of it.
        flags = arm | self.setting.keys_of(methods, self.out) | {"learning_rate": cell.learning_rate}
        flags |= {} if "lora" in methods else {"selection_seed": cell.selection}
        flags |= {"schedule_seed": cell.selection} if "lisa" in methods else {}
        folder = self.out / f".run-{cell.name}"  # what a killed process has left is deleted
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
        flags |= {"output_dir": str(folder / "run")}
        config = load_config(self.objective, folder / "recipe.yaml", *methods, **flags)
        if not train(make_plan(config)).ok:
            raise HFTError(f"{cell.name} does not verify")
        model = model_of(folder / "run")
        measured = self.way_back(model) if isinstance(cell, Keep) else self.measured(model)
        seconds = {"seconds": round(time.time() - began, 1)}
        save(path, {"cell": asdict(cell), "keys": config.values} | measured | self.about | seconds)
        shutil.rmtree(folder)


def model_of(folder: Path) -> Any:
    """A model in fp32; an adapter merged into its base."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").exists():
        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32").merge_and_unload()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def work(content: dict[str, Any], size: str, out: Path, todo: list[Cell]) -> None:
    """Do the cells that nobody has done or is doing."""
    log = (out / f"log-{os.getpid()}.txt").open("w")
    with redirect_stdout(log), redirect_stderr(log):
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        bench = Bench(content, size, out)
        with waiting_for(out / "start.lock"):
            for name, folder in bench.setting.references(bench.start).items():
                bench.reference(name, folder)
        for cell in todo:
            path = out / "cells" / f"{cell.name}.json.gz"
            with claimed(path.with_suffix(".lock")) as mine:
                if path.exists():
                    check_same(load(path), bench.about, path)
                elif mine:
                    try:
                        bench.run(cell, path)
                        path.with_suffix(".failed").unlink(missing_ok=True)
                    except Stopped:
                        raise
                    except HFTError as error:  # such as a loss that is not finite; the page lists it
                        path.with_suffix(".failed").write_text(str(error))
            progress(content, out, todo)


def check_same(found: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to mix cells that were made with other settings."""
    if found["settings"] != json.loads(json.dumps(now["settings"])):
        raise SystemExit(f"{path} was made with other settings; give another --out")


def progress(content: dict[str, Any], out: Path, todo: list[Cell]) -> None:
    """Write how far the grid is to OUT/progress.txt."""
    done = [cell for cell in todo if (out / "cells" / f"{cell.name}.json.gz").exists()]
    failed = sorted(path.stem for path in (out / "cells").glob("*.failed"))
    lines = [f"{len(done)} of {len(todo)} cells are done, {len(failed)} failed ({time.strftime('%F %T')})"]
    for seed in sorted({cell.seed for cell in todo}):
        of_seed = [cell for cell in todo if cell.seed == seed]
        lines.append(f"seed {seed}: {len(set(of_seed) & set(done))} of {len(of_seed)}")
    part = out / f"progress.{os.getpid()}.part"  # whoever reads it finds it whole
    part.write_text("\n".join([*lines, *failed]) + "\n")
    part.replace(out / "progress.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--out", type=Path, help="default: runs/forgetting-SIZE, and -quick with --quick")
    parser.add_argument("--quick", action="store_true", help="three arms, two rates, two seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at once; 0: only write the page")
    parser.add_argument("--page", type=Path, help="the page to write; default: OUT/report.md")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only cells in whose names all of these words are")
    options = parser.parse_args()
    out = options.out or Path(f"runs/forgetting-{options.size}{'-quick' if options.quick else ''}")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    content = read_size(options.size)
    todo = list(dict.fromkeys(cells(content, quick=options.quick)))
    todo = [cell for cell in todo if all(word in f"{cell.name}-" for word in options.only or ())]
    workers = []
    if options.jobs:
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
        workers = [
            get_context("spawn").Process(target=work, args=(content, options.size, out.resolve(), todo))
            for _ in range(options.jobs)
        ]
        for worker in workers:
            worker.start()
        watch(workers, out)
    from page import write_page

    command = f"make forgetting SIZE={options.size}" + (' ARGS="--quick"' if options.quick else "")
    page = options.page or out / "report.md"
    print(f"\n{write_page(out, content, todo, page, command)}\n\n{page}, {page.with_suffix('.png')}")
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed; the same command continues")


def watch(workers: list, out: Path) -> None:
    """A progress line until all workers have ended."""
    print(f"making the start model and the cells in {out}; each process writes a log there", flush=True)
    while any(worker.is_alive() for worker in workers):
        time.sleep(2)
        if (path := out / "progress.txt").exists():
            print(f"\r{path.read_text().splitlines()[0]}", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
