"""`hft merge --method delta`: what a run saved of its model with `save_only_trained`, put back into its base."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from hft.errors import HFTError, reason
from hft.merging.checkpoint import check_out, check_verified, copy_companions
from hft.merging.config import MergeConfig
from hft.model.anatomy import meta_model
from hft.model.load import read_config
from hft.model.weights import MODEL_CONFIG, downloaded, local_folder, weights_of
from hft.record.manifest import Manifest
from hft.record.verification import OnBase
from hft.selection.masks import MASKS_NAME


def merge_delta(config: MergeConfig) -> Callable[[Path], str]:
    """Check what a run has saved, or a checkpoint in fp32, and return what writes the model that the run would have
    saved without `save_only_trained`, bit for bit.
    """
    [run] = config.models
    folder = downloaded(run)
    manifest = Manifest.load(folder)
    if not manifest.only_trained:
        raise HFTError(f"{run} holds the whole model already")
    check_out(Path(config.out), [folder])
    check_verified(run, folder, config.base)
    base = local_folder(config.base) if config.base else local_folder(manifest.base, manifest.revision)
    check_out(Path(config.out), [base])

    def write(new: Path) -> str:
        state = dict(OnBase(folder, manifest, weights_of(base, manifest.frozen_checksums)))
        size = tqdm.format_sizeof(sum(tensor.nbytes for tensor in state.values()), "B")
        # By the names of the base's files, where transformers computes with stacked experts.
        model = meta_model(read_config(run, folder))
        try:
            model.save_pretrained(new, state_dict=state, max_shard_size=config.max_shard_size)
        except ValueError as error:
            raise HFTError(f"cannot write {config.out}: {reason(error)}; is max_shard_size as 5GB is?") from error
        copy_companions(folder, new, but=(MODEL_CONFIG,))
        shutil.copyfile(folder / MODEL_CONFIG, new / "config.json")
        replace(manifest, only_trained=False, moved=[]).save(new)
        if manifest.masks:
            shutil.copyfile(folder / MASKS_NAME, new / MASKS_NAME)
        return f"wrote {size}"

    return write
