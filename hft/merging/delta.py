"""`hft merge --method delta`: what a run saved of its model with `save_only_trained`, put back into its base."""

from __future__ import annotations

import shutil
import time
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hft.errors import HFTError
from hft.merging.checkpoint import Checkpoint, check_out, copy_companions, new_folder, write_model, written_in
from hft.model.weights import MODEL_CONFIG, Weights, downloaded
from hft.record.manifest import Manifest
from hft.record.verification import verify_folder
from hft.selection.masks import MASKS_NAME


def merge_delta(
    run: str, base: str | None, out: Path, finish: Callable[[Path], None], *, max_shard_size: str = "5GB"
) -> str:
    """Make the model that a run would have saved without `save_only_trained`, bit for bit, tensor by tensor.

    Args:
        run: folder or Hub id of what it saved; a checkpoint gives its fp32 master weights.
        base: the model it started from, if that is not where the run had it.
        out: folder for the result.
        finish: called with the folder before it is renamed to `out`.
        max_shard_size: bytes of a file, as `save_pretrained` takes it.

    Returns:
        How much was written, and how fast.
    """
    start, folder = time.monotonic(), downloaded(run)
    manifest = Manifest.load(folder)
    if not manifest.only_trained:
        raise HFTError(f"{run} holds the whole model already")
    try:
        whole = Checkpoint.open(base or manifest.base, None if base else manifest.revision)
    except HFTError as error:
        raise HFTError(f"the base of {run} cannot be read: {error}; name it with --base") from error
    check_out(out, [replace(whole, name=run, folder=folder), whole])
    if not (found := verify_folder(folder, str(whole.folder))).ok:
        wrong = [*found.broken, *found.lost, *found.unlisted][0]
        raise HFTError(f"{whole.name} is not the base of {run}, or one of the two is damaged: {wrong} differs")
    trained = Weights(folder)
    specs = {name: spec for name, spec in whole.specs.items() if name in whole.parameters} | trained.specs()
    whole = replace(whole, weights=ChainMap(trained, whole.weights), specs=specs)
    with new_folder(out) as new:
        written = write_model(new, whole, whole.weights.__getitem__, max_shard_size=max_shard_size)
        copy_companions(folder, new, but=(MODEL_CONFIG,))
        shutil.copyfile(folder / MODEL_CONFIG, new / "config.json")
        replace(manifest, only_trained=False, moved=[]).save(new)
        if manifest.masks:
            shutil.copyfile(folder / MASKS_NAME, new / MASKS_NAME)
        finish(new)
    return written_in(written, start)
