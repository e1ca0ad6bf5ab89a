"""`hft merge --method delta`: what a run saved of its model with `save_only_trained`, put back into its base."""

import shutil
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hft.errors import HFTError
from hft.merging.checkpoint import check_out, check_verified, copy_companions, open_base, write_model
from hft.merging.config import MergeConfig
from hft.model.weights import MODEL_CONFIG, Weights, downloaded
from hft.record.manifest import Manifest
from hft.selection.masks import MASKS_NAME


def merge_delta(config: MergeConfig) -> Callable[[Path], str]:
    """Check what a run has saved, or a checkpoint in fp32, and return what writes the model that the run would have
    saved without `save_only_trained`, bit for bit and tensor by tensor.
    """
    [run] = config.models
    folder = downloaded(run)
    manifest = Manifest.load(folder)
    if not manifest.only_trained:
        raise HFTError(f"{run} holds the whole model already")
    whole = open_base(run, config.base, manifest.base, manifest.revision)
    check_out(Path(config.out), [replace(whole, name=run, folder=folder), whole])
    check_verified(run, folder, whole)
    trained = Weights(folder)
    specs = {name: spec for name, spec in whole.specs.items() if name in whole.parameters} | trained.specs()
    whole = replace(whole, weights=ChainMap(trained, whole.weights), specs=specs)

    def write(new: Path) -> str:
        done = write_model(new, whole, whole.weights.__getitem__, max_shard_size=config.max_shard_size)
        copy_companions(folder, new, but=(MODEL_CONFIG,))
        shutil.copyfile(folder / MODEL_CONFIG, new / "config.json")
        replace(manifest, only_trained=False, moved=[]).save(new)
        if manifest.masks:
            shutil.copyfile(folder / MASKS_NAME, new / MASKS_NAME)
        return done

    return write
