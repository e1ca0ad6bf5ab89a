"""What a run saved without its base, made a whole model: `hft merge --method adapter` and `--method delta`."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hft.errors import HFTError, reason
from hft.merging.checkpoint import Checkpoint, check_out, check_verified, copy_companions, open_base, write_model
from hft.merging.config import MergeConfig
from hft.model.anatomy import meta_model
from hft.model.load import ids_beyond, read_config, vocabulary
from hft.model.weights import MODEL_CONFIG, downloaded, local_folder, weights_of, widest
from hft.record.manifest import MANIFEST_NAME, Manifest
from hft.record.verification import OnBase
from hft.selection.masks import MASKS_NAME


def merge_adapter(config: MergeConfig) -> Callable[[Path], str]:
    """Read an adapter that PEFT saved and its base, whole and in fp32, and return what writes them as one model."""
    [adapter] = config.models
    try:
        found = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HFTError(f"{adapter} holds no adapter that PEFT saved: {reason(error)}") from error
    if found.is_prompt_learning:
        raise HFTError(f"{adapter} is {found.peft_type.value}: learned prompts are not weights and cannot be merged")
    base = open_base(adapter, config.base, found.base_model_name_or_path, found.revision)
    check_out(Path(config.out), [base.folder])
    if proven := (local_folder(adapter) / MANIFEST_NAME).exists():
        check_verified(adapter, local_folder(adapter), str(base.folder))
    unproven = f"\nNOTE: nothing but --base says that {adapter} was trained on {base.name}"
    known = vocabulary(base.folder)
    new = {token: index for token, index in vocabulary(local_folder(adapter)).items() if token not in known}
    # Ids beyond the embeddings that the base itself has are not this merge's matter.
    if notes := ids_beyond(new, base.config.get_text_config().vocab_size):
        raise HFTError(f"{adapter}: {notes[0]}")
    state = merged_state(adapter, found, base)

    def write(folder: Path) -> str:
        done = write_model(folder, base, state.__getitem__, max_shard_size=config.max_shard_size)
        copy_companions(local_folder(adapter), folder, but=("config.json", "generation_config.json"))
        return done if proven or not config.base else done + unproven

    return write


def merged_state(adapter: str, config: PeftConfig, base: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights of a base with an adapter added, which may change no shape and no tied embeddings."""
    try:
        # OSF takes its factors from the weights as they are stored; the others are added more exactly in fp32.
        dtype = widest(base.weights.dtypes().values()) if config.peft_type == PeftType.OSF else torch.float32
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise HFTError(f"cannot merge {adapter} into {base.name}: {reason(error)}") from error
    state = model.state_dict()
    # Merged into one of two tied tensors, an adapter of the other or of this one alone would change both.
    for key, owner in base.tied.items():
        stored = base.weights[owner].to(state[owner].dtype)
        if not (torch.equal(state[owner], stored) and torch.equal(state[key], stored)):
            raise HFTError(f"{adapter} changes {key} or {owner}, which {base.name} ties; save that with both untied")
    if wrong := [key for key in base.parameters if state[key].shape != base.specs[key].shape]:
        raise HFTError(f"{adapter} changes the shape of {wrong[0]}; only adapters that keep all shapes can be merged")
    return state


def merge_delta(config: MergeConfig) -> Callable[[Path], str]:
    """Check what a run saved, and return what writes what it would have without `save_only_trained`, bit for bit."""
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
            raise HFTError(f"cannot write {config.out}: {reason(error)}; max_shard_size must look like 5GB") from error
        copy_companions(folder, new, but=(MODEL_CONFIG,))
        shutil.copyfile(folder / MODEL_CONFIG, new / "config.json")
        replace(manifest, only_trained=False, moved=[]).save(new)
        if manifest.masks:
            shutil.copyfile(folder / MASKS_NAME, new / MASKS_NAME)
        return f"wrote {size}"

    return write
