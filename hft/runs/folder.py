"""The output folder of a run: what it holds, where to go on from, and that no earlier work is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hft.config import read_yaml, to_yaml
from hft.errors import HFTError
from hft.freezing import ResetVerification, Verification, verify
from hft.machine import say
from hft.model.weights import local_folder, weights_of
from hft.record.manifest import NAME as MANIFEST_NAME
from hft.record.manifest import Manifest
from hft.selection import Mask, Selection
from hft.selection.masks import FILE_NAME as MASKS_NAME
from hft.selection.masks import load_masks
from hft.selection.picture import draw_selection

if TYPE_CHECKING:
    from hft.runs.method import Method

CONFIG_NAME = "config.yaml"
RESULTS_NAME = "results.json"
PICTURE_NAME = "selection.png"
FINISHED = "finished"
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")

# Keys that say how and where to run, not what: they neither name a run nor make it another one.
RUN_KEYS = ("output_dir", "run_name", "report_to", "resume_from_checkpoint", "dry_run", "use_cpu", "bf16")


def prepare_folder(out: Path, config: dict[str, Any], method: Method) -> str | None:
    """Make the output folder ready, and find out where to start.

    Args:
        out: the folder.
        config: the resolved config.
        method: what the run will do.

    Returns:
        The checkpoint to resume from, `FINISHED`, or None to start from the base.

    Raises:
        HFTError: the folder cannot be written to, holds another run, or is the base itself.
    """
    base = config["model_name_or_path"]
    if Path(base).is_dir() and Path(base).resolve().is_relative_to(out.resolve()):
        raise HFTError(f"output_dir {out} is the base itself, or holds it; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise HFTError(f"cannot write to output_dir {out}: {error.strerror}") from error

    check_base(base)
    start = config["resume_from_checkpoint"]
    if start in ("auto", "true"):
        start = _find_start(out, config)
    elif start in (None, "none", "false"):
        _clear(out)
        start = None
    if start not in (None, FINISHED):
        if not method.is_deferred:
            theirs = Manifest.load(start)
            ours = Manifest.of(
                method.selection, base, theirs.frozen_checksums, update=method.update.record(), schedule=method.schedule
            )
            ours.check_resumable(theirs, start)
        say(f"resuming from {start}", "")
    return start


def claim_folder(out: Path, config: dict[str, Any], selection: Selection) -> None:
    """Write what this run is into its folder, once nothing more can refuse it."""
    (out / CONFIG_NAME).write_text(to_yaml(config))
    (out / RESULTS_NAME).unlink(missing_ok=True)
    if not config.get("adapter"):
        draw_selection(selection, config["run_name"]).savefig(out / PICTURE_NAME)


def check_base(base: str) -> None:
    """Hold a base that is an earlier run's output against its own manifest.

    Raises:
        HFTError: its frozen tensors are not those that the manifest tells of, so its rounds cannot be told.
    """
    if not (Path(base) / MANIFEST_NAME).exists():
        return
    manifest = Manifest.load(base)
    found = verify(*_what_to_verify(Path(base), manifest), base=None, masks=_masks_of(Path(base), manifest))
    if not found.ok:
        wrong = [*found.broken, *found.lost][0]
        raise HFTError(
            f"{base} does not match its {MANIFEST_NAME}: {wrong} is another; put back the model "
            "that the manifest was written for, or remove the manifest to start a new sequence"
        )


def _find_start(out: Path, config: dict[str, Any]) -> str | None:
    earlier = read_yaml(out / CONFIG_NAME) if (out / CONFIG_NAME).exists() else {}
    changes = [
        f"{key} {earlier.get(key, 'unset')} there, {config.get(key, 'unset')} here"
        for key in sorted(earlier.keys() | config.keys())
        if key not in RUN_KEYS and earlier.get(key) != config.get(key)
    ]
    if (out / RESULTS_NAME).exists():
        if not changes:
            return FINISHED
        raise HFTError(
            f"{out} holds a finished run with other settings ({'; '.join(changes)}): choose another --output_dir, or "
            "--resume_from_checkpoint none to overwrite it"
        )
    checkpoint = last_checkpoint(out)
    if checkpoint and changes:
        say(f"NOTE: going on with other settings than before: {'; '.join(changes)}")
    return checkpoint


def _clear(out: Path) -> None:
    """Remove an earlier run's checkpoints and model, lest they be taken for this run's."""
    for checkpoint in checkpoints(out):
        if (checkpoint / MANIFEST_NAME).exists():
            say(f"removing {checkpoint} of an earlier run")
            shutil.rmtree(checkpoint)
    if (out / MANIFEST_NAME).exists():
        for path in (
            *out.glob("model*.safetensors*"),
            *out.glob("adapter_*"),
            out / MASKS_NAME,
            out / MANIFEST_NAME,
            out / RESULTS_NAME,
        ):
            path.unlink(missing_ok=True)


def verify_folder(out: Path, base: str | None = None) -> Verification | ResetVerification:
    """Hold an output folder's frozen half against its base; against the manifest's checksums if that is gone.

    Of a Half-Reset the other half is held against the tuned model, where that is at hand.

    Raises:
        HFTError: the folder or a base given by name cannot be read.
    """
    manifest = Manifest.load(out)
    adapted = "adapter" in manifest.selection  # then what trained is not among the base's weights
    try:
        folder = local_folder(base) if base else local_folder(manifest.base, manifest.revision)
        base_weights = weights_of(
            folder, [*manifest.frozen_checksums, *([] if adapted else manifest.trained_parameters)]
        )
    except HFTError:
        if base:
            raise
        folder, base_weights = out, None
    if adapted:
        return verify_adapter(out, manifest, base_weights)
    masks = _masks_of(out, manifest)
    ours, frozen, trained = _what_to_verify(out, manifest)
    if not manifest.tuned:
        return verify(ours, frozen, trained, base_weights, masks=masks, against=_short(folder))
    back = verify(ours, frozen, (), base_weights, masks=masks, against=_short(folder))
    try:
        folder = local_folder(manifest.tuned)
        tuned = weights_of(folder, trained)
    except HFTError:
        return ResetVerification(back, None, manifest.tuned)
    others = {name: ~mask for name, mask in masks.items()}
    kept = verify(ours, dict.fromkeys(trained, ""), (), tuned, masks=others, against=_short(folder))
    return ResetVerification(back, kept, manifest.tuned)


def _short(folder: Path) -> str:
    return min(str(folder), os.path.relpath(folder), key=len)


def _masks_of(folder: Path, manifest: Manifest) -> dict[str, Mask]:
    """The masks of a folder's partly frozen tensors, none if there are none.

    Raises:
        HFTError: they are missing, or not those that its manifest was written with.
    """
    masks = load_masks(folder) if manifest.masks else {}
    for name, digest in manifest.masks.items():
        if name not in masks or masks[name].digest() != digest:
            raise HFTError(f"{folder / MASKS_NAME} is not the one that the manifest was written with: {name} differs")
    return masks


def _what_to_verify(out: Path, manifest: Manifest) -> tuple[Mapping[str, torch.Tensor], dict[str, str], list[str]]:
    return (
        weights_of(out, [*manifest.frozen_checksums, *manifest.trained_parameters]),
        manifest.frozen_checksums,
        manifest.trained_parameters,
    )


def verify_adapter(out: Path, manifest: Manifest, base: Mapping[str, torch.Tensor] | None) -> Verification:
    """Hold an adapter's base against the checksums it was trained with: it is not in the folder, and must not change.

    Raises:
        HFTError: the base is gone, without which the adapter is nothing.
    """
    if base is None:
        raise HFTError(f"the base of {out}, {manifest.base}, is gone; name it with --base")
    found = verify(base, manifest.frozen_checksums, (), None)
    moved, trained = set(manifest.moved), set(manifest.trained_parameters)
    found.changed, found.unchanged = sorted(moved & trained), sorted(trained - moved)
    found.broken |= dict.fromkeys(sorted(moved - trained), "changed in memory while the adapter was trained")
    found.lost = [] if (out / ADAPTER_NAME).exists() else [ADAPTER_NAME]
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    found = [path for path in folder.glob("*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in a folder that was written to its end, or None.

    The trainer writes its state after everything else, so a checkpoint without it was cut off.
    """
    for checkpoint in reversed(checkpoints(Path(folder))):
        state = checkpoint / TRAINER_STATE_NAME
        if (checkpoint / MANIFEST_NAME).exists() and state.exists() and _is_json(state):
            return str(checkpoint)
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
