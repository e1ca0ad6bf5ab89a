"""A run's folder before the run: whether it can be written to, and what in it is to be resumed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hft.errors import HFTError
from hft.machine import is_sharded, is_zero3
from hft.record.checkpoints import checkpoints, last_checkpoint
from hft.record.identity import base_digests, check_same_run, differences
from hft.record.manifest import MANIFEST_NAME, Manifest
from hft.record.verification import check_base
from hft.runs.config import Config, comparable, read_saved_config
from hft.runs.result import CONFIG_NAME, RESULTS_NAME

# What the optimizer's state restores or was made by, whatever the new settings are.
RESTORED = ("learning_rate ", "learning_rate_factor ", "weight_decay ", "adam_beta", "adam_epsilon ")
RESTORED += ("optim ", "optim_args ", "optim_target_modules ")
ADAMW = {"adamw_torch", "adamw_torch_fused"}  # whose state is the same


def check_output(config: Config) -> None:
    """Refuse an output folder that cannot be written to, or that holds the base."""
    out, base = config.out, config.run.model_name_or_path
    if Path(base).is_dir() and Path(base).resolve().is_relative_to(out.resolve()):
        raise HFTError(f"output_dir {out} is the base itself, or holds it; choose another")
    existing = next(path for path in [out.resolve(), *out.resolve().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise HFTError(f"cannot write to output_dir {out}: {existing} is not a folder that you may write to")
    check_base(base)


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    resume_from: str | None = None  # the checkpoint that it resumes from; None for the base
    is_finished: bool = False  # whether the folder holds this very run, finished
    notes: tuple[str, ...] = ()  # what is worth knowing about it, one sentence each


def find_start(config: Config, identity: dict[str, Any], args: TrainingArguments) -> Start:
    """Where a run starts; refuses a folder or a checkpoint of another run, by its `identity` (`identity_of`)."""
    values, out, notes = config.values, config.out, []
    start = values["resume_from_checkpoint"]
    if start in (None, "none", "false"):
        return Start()
    is_auto, is_finished = start in ("auto", "true"), (out / RESULTS_NAME).exists()
    if not (is_auto or Path(start).is_dir()):
        raise HFTError(f"checkpoint {start} not found")
    saved = (out if is_auto else Path(start).resolve().parent) / CONFIG_NAME
    before = read_saved_config(saved) if saved.exists() else values
    changes = differences(comparable(values), comparable(before))
    if is_auto and is_finished:
        if not changes:
            base = {"base": base_digests(config.run.model_name_or_path)}
            check_same_run(identity | base, Manifest.load(out).identity, out)
            return Start(is_finished=True)
        raise HFTError(
            f"{out} holds a finished run with other settings ({'; '.join(changes)}): choose another "
            "--output_dir, or --resume_from_checkpoint none to overwrite it"
        )
    if is_auto:
        start = last_checkpoint(out)
    elif is_finished:
        notes.append(f"NOTE: {out} holds a finished run, which this one replaces")
    if not is_auto and (later := replaced(out, start)):
        notes.append(f"NOTE: {', '.join(path.name for path in later)} in {out} will be removed")
    if not start:
        return Start(notes=tuple(notes))
    check_same_run(identity, Manifest.load(start).identity, start)
    optims = {str(one.get("optim") or config.objective.config.optim) for one in (values, before)}
    restored = [change for change in changes if change.startswith(RESTORED) or "reduce_lr_on_plateau" in change]
    if restored := [change for change in restored if not (change.startswith("optim ") and optims <= ADAMW)]:
        other = "another --output_dir, or --resume_from_checkpoint none"
        remedy = other if is_auto else "the same ones, or the checkpoint as --model_name_or_path"
        what = f"cannot resume from {start}, whose optimizer keeps its own settings"
        raise HFTError(f"{what}: {'; '.join(restored)}; give {remedy}")
    if changes:
        notes.append(f"NOTE: resuming with other settings than before: {'; '.join(changes)}")
    check_complete(Path(start), args)
    return Start(start, notes=(*notes, f"resuming from {start}"))


def replaced(out: Path, resumed: str | None) -> list[Path]:
    """The checkpoints in a folder that a run replaces: those after the one it resumes from, or else all of them."""
    found = [path for path in checkpoints(out) if (path / MANIFEST_NAME).exists()]
    same = [index for index, path in enumerate(found) if resumed and path.samefile(resumed)]
    return found[same[0] + 1 :] if same else found


def check_complete(checkpoint: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint without states, or with another engine's: Trainer would silently start them again."""
    parts = list(checkpoint.glob("global_step*/*optim_states.pt"))  # of ZeRO-3, one of each process that saved it
    states = {
        "ddp": (checkpoint / "optimizer.pt").exists(),
        "fsdp2": any((checkpoint / name).exists() for name in ("optimizer.bin", "optimizer_0")),
        "zero3": bool(parts),
    }
    now = "zero3" if is_zero3(args) else "fsdp2" if is_sharded(args) else "ddp"
    saved = [engine for engine, found in states.items() if found]
    if len(saved) == 1 and saved != [now]:
        what = f"its optimizer state was saved under {saved[0]}"
        raise HFTError(f"cannot resume from {checkpoint}: {what}; add --engine {saved[0]}")
    if now == "zero3" and len(parts) not in (0, args.world_size):
        processes = Manifest.load(checkpoint).processes or len(parts)
        why = "ZeRO-3 resumes on as many processes as saved it, all with access to its folder"
        found = f"{processes} saved it, the parts of {len(parts)} are here, and this run has {args.world_size}"
        raise HFTError(f"cannot resume from {checkpoint}: {why}; {found}")
    if not (saved and (checkpoint / "scheduler.pt").exists()):
        why = "it holds no optimizer or scheduler state (save_only_model), so the run would not continue exactly"
        remedy = "--resume_from_checkpoint none, or give it as --model_name_or_path with another --output_dir"
        raise HFTError(f"cannot resume from {checkpoint}: {why}; start again with {remedy}")
