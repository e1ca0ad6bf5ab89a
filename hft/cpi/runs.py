"""What the stages share: a run of `hft sft`, work of the first process, and whether an output is up to date."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hft.errors import HFTError
from hft.machine import broadcast, is_main, say, world_size
from hft.merging.checkpoint import new_folder
from hft.record.identity import file_digest
from hft.record.manifest import write_json
from hft.runs.arguments import machine_settings
from hft.runs.config import load_config
from hft.runs.plan import make_plan
from hft.runs.result import CONFIG_NAME
from hft.runs.train import train

P, T = ParamSpec("P"), TypeVar("T")


def train_sft(out: Path, values: Mapping[str, Any], *inputs: Path) -> None:
    """Train or resume a run of `hft sft`, or verify a finished one; refuse one that began from other files."""
    name = "-".join(out.resolve().parts[-3:])  # of the stages' folder, the stage and the run
    plan = make_plan(load_config("sft", **values, output_dir=str(out), run_name=name))
    started = out / "stage.json"
    if started.exists() and not is_current(started, {}, *inputs):
        raise HFTError(f"{out} was trained from other rows or another model than are there now; remove it")
    if is_main():
        write_record(started, {}, *inputs)
    say(f"hft sft --config {out / CONFIG_NAME}", "", *([] if plan.start.is_finished else [plan.report()]))
    if not train(plan).ok:
        raise HFTError(f"verify failed for {out}: see above")


def join_processes(values: dict[str, Any]) -> None:
    """Start torch.distributed as a trainer would, which comes later."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=bool((values | machine_settings(values)).get("use_cpu")))


def in_main_process(function: Callable[P, T]) -> Callable[P, T]:
    """A function that runs in the first process, and returns its value in every one; the others wait."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return broadcast(function(*args, **kwargs) if is_main() else None)

    return run


def write_record(record: Path, settings: Mapping[str, Any], *inputs: Path) -> None:
    """Write an output's JSON, which comes last: settings, and SHA-256 of the files that it was made from."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {**settings, "inputs": list(map(file_digest, inputs))})


def is_current(record: Path, settings: Mapping[str, Any], *inputs: Path) -> bool:
    """Whether an output's JSON holds these settings, and was made from what the files hold now."""
    wanted = {**settings, "inputs": list(map(file_digest, inputs))}
    return record.exists() and wanted.items() <= json.loads(record.read_text()).items()


@contextmanager
def replaced_folder(out: Path, record: str) -> Iterator[Path]:
    """`new_folder`, which replaces what the same stage wrote before: a folder that holds its record."""
    with new_folder(out) as folder:
        yield folder
        if (out / record).exists():
            shutil.rmtree(out)
