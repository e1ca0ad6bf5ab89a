"""Resumes ZeRO-3 on another number of processes than saved the checkpoint, by DeepSpeed's universal checkpoints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hft.errors import HFTError
from hft.machine import is_main, say
from hft.record.checkpoints import RESHARDED, zero3_parts

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer


@contextmanager
def resharded(trainer: Trainer, checkpoint: str) -> Iterator[str]:
    """What an engine that is built meanwhile can load: the checkpoint, or a folder with what DeepSpeed made of it.

    The folder is in the output folder, since a checkpoint may be read-only or shared, and is removed afterwards.

    Raises:
        HFTError: DeepSpeed cannot convert the checkpoint.
    """
    saved, here = len(zero3_parts(checkpoint)), trainer.args.world_size
    if saved == here:
        yield checkpoint
        return
    say(f"converting {checkpoint} from {saved} to {here} processes")
    folder = Path(trainer.args.output_dir) / RESHARDED
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    before = config.get("checkpoint", {})
    try:
        if is_main():
            convert(Path(checkpoint), folder)
        trainer.accelerator.wait_for_everyone()
        config["checkpoint"] = before | {"load_universal": True}
        yield str(folder)
        repair(trainer.model_wrapped.optimizer.optimizer, folder)
        trainer.accelerator.wait_for_everyone()  # they read it too
    finally:
        config["checkpoint"] = before
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def convert(checkpoint: Path, folder: Path) -> None:
    """Fill a folder with links to a checkpoint's files and with its universal form."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    for path in checkpoint.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    parts = folder / (folder / "latest").read_text()
    # In a process of its own: it forks workers, and this one has the threads of CUDA and NCCL.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(parts), "--output_folder", str(folder / "universal")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise HFTError(f"DeepSpeed could not convert {checkpoint}: {said}; launch as many processes as saved it")


def repair(optimizer: Optimizer, folder: Path) -> None:
    """Put right what DeepSpeed 0.19.8 gets wrong when stage 3 loads a universal checkpoint.

    It gives all parameter groups the settings of the first, so that norms and biases would decay, and all states the
    same tensor to count steps in, on the CPU, so that each of them would advance it.
    """
    saved = torch.load(folder / "universal" / "zero" / "optimizer_state.pt", mmap=True, weights_only=False)
    for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state["step"]):  # DeepSpeed's own Adam counts in numbers
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            state["step"] = state["step"].to(device, copy=True)
