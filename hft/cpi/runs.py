"""What the stages have in common: a run of `hft sft`, work of one process, and whether an output is up to date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hft.errors import HFTError
from hft.machine import broadcast, is_main, say, world_size
from hft.merging.checkpoint import new_folder
from hft.model.weights import weight_files
from hft.runs.arguments import machine_settings
from hft.runs.config import load_config
from hft.runs.plan import make_plan
from hft.runs.result import CONFIG_NAME, RunResult
from hft.runs.train import train

T = TypeVar("T")


def train_sft(out: Path, values: Mapping[str, Any], *inputs: Path) -> RunResult:
    """Train a run of `hft sft`, or take it up again; a finished one is only verified.

    Args:
        out: its folder.
        values: its keys, whole.
        inputs: files that it is made from beside the dataset.

    Raises:
        HFTError: the run cannot be made, verify failed, or the folder holds a run that is older than its inputs.
    """
    name = "-".join(out.resolve().parts[-3:])  # of the stages' folder, the stage and the run
    plan = make_plan(load_config("sft", **values, output_dir=str(out), run_name=name))
    if plan.start.is_finished and (newer := newer_than(weight_files(out), *inputs)):
        raise HFTError(f"{out} was trained before {newer} was written, which it starts from; remove it to train again")
    say(f"hft sft --config {out / CONFIG_NAME}", "")
    say(*([] if plan.start.is_finished else [plan.report()]))
    result = train(plan)
    if not result.ok:
        raise HFTError(f"verify failed for {out}: see above")
    return result


def join_processes(values: Mapping[str, Any]) -> None:
    """Start torch.distributed as a trainer would, for the work of the first process that comes before any trainer."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=bool((dict(values) | machine_settings(dict(values))).get("use_cpu")))


def in_main_process(function: Callable[[], T]) -> T:
    """What a function returns in the first process, in every process; the others wait."""
    return broadcast(function() if is_main() else None)


def is_current(record: Path, settings: Mapping[str, Any], *inputs: Path) -> bool:
    """Whether an output was made with these settings, and after the files that it is made from.

    Args:
        record: the JSON that was written last of the output.
        settings: keys that it must hold, with their values.
        inputs: the files.
    """
    if not record.exists():
        return False
    content = json.loads(record.read_text())
    return all(content.get(key) == value for key, value in settings.items()) and not newer_than([record], *inputs)


@contextmanager
def replaced_folder(out: Path, record: str) -> Iterator[Path]:
    """`new_folder`, in the place of what the same stage wrote before: a folder that holds its record."""
    with new_folder(out) as folder:
        yield folder
        if (out / record).exists():
            shutil.rmtree(out)


def newer_than(outputs: list[Path], *inputs: Path) -> Path | None:
    """An input that was written after one of the outputs, if there is one."""
    oldest = min(path.stat().st_mtime_ns for path in outputs)
    return next((path for path in inputs if path.stat().st_mtime_ns > oldest), None)
