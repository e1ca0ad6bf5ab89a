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
from hft.record.manifest import MANIFEST_NAME
from hft.runs.arguments import machine_settings
from hft.runs.config import load_config
from hft.runs.plan import make_plan
from hft.runs.result import CONFIG_NAME
from hft.runs.train import train

P, T = ParamSpec("P"), TypeVar("T")


def train_sft(out: Path, values: Mapping[str, Any], *inputs: Path) -> None:
    """Train a run of `hft sft` with these keys, or resume it; a finished one is only verified.

    The run refuses a folder with other settings. It cannot see that the files it started from, `inputs`, were written
    again later; then it is refused here.
    """
    name = "-".join(out.resolve().parts[-3:])  # of the stages' folder, the stage and the run
    plan = make_plan(load_config("sft", **values, output_dir=str(out), run_name=name))
    if plan.start.is_finished and not is_current(out / MANIFEST_NAME, {}, *inputs):
        raise HFTError(f"{out} was trained before its rows or the model it starts from; remove it to train again")
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


def is_current(record: Path, settings: Mapping[str, Any], *inputs: Path) -> bool:
    """Whether an output's JSON, written last, holds these settings, and no input was written after it."""
    if not (record.exists() and settings.items() <= json.loads(record.read_text()).items()):
        return False
    return all(path.stat().st_mtime_ns <= record.stat().st_mtime_ns for path in inputs)


@contextmanager
def replaced_folder(out: Path, record: str) -> Iterator[Path]:
    """`new_folder`, which replaces what the same stage wrote before: a folder that holds its record."""
    with new_folder(out) as folder:
        yield folder
        if (out / record).exists():
            shutil.rmtree(out)
