"""`hft merge --method adapter`: an adapter that PEFT saved, added to its base."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hft.errors import HFTError, reason
from hft.merging.checkpoint import Checkpoint, check_out, copy_companions, new_folder, write_model, written_in
from hft.model.vocabulary import ids_beyond, vocabulary
from hft.model.weights import local_folder, widest


def merge_adapter(
    adapter: str, base: str | None, out: Path, finish: Callable[[Path], None], *, max_shard_size: str = "5GB"
) -> str:
    """Merge an adapter into its base; unlike the other operators this holds the model in memory, in fp32.

    Args:
        adapter: folder or Hub id of the adapter.
        base: the model it was trained on, if that is not the one that the adapter names.
        out: folder for the result.
        finish: called with the folder before it is renamed to `out`.
        max_shard_size: bytes of a file, as `save_pretrained` takes it.

    Returns:
        How much was written, and how fast.
    """
    start, config = time.monotonic(), adapter_config(adapter)
    model = base_of_adapter(config, adapter, base)
    check_out(out, [model])
    known = vocabulary(model.folder)
    new = {token: index for token, index in vocabulary(local_folder(adapter)).items() if token not in known}
    if notes := ids_beyond(new, model.num_embeddings):  # such ids of the base itself are not this merge's matter
        raise HFTError(f"{adapter}: {notes[0]}")
    state = merged_state(adapter, config, model)
    with new_folder(out) as folder:
        written = write_model(folder, model, state.__getitem__, max_shard_size=max_shard_size)
        copy_companions(local_folder(adapter), folder, but=("config.json", "generation_config.json"))
        finish(folder)
    return written_in(written, start)


def adapter_config(adapter: str) -> PeftConfig:
    """PEFT's config of an adapter; a learned prompt cannot be merged."""
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HFTError(f"{adapter} holds no adapter that PEFT saved: {reason(error)}") from error
    if config.is_prompt_learning:
        raise HFTError(f"{adapter} is {config.peft_type.value}: learned prompts are not weights and cannot be merged")
    return config


def base_of_adapter(adapter: PeftConfig, name: str, base: str | None) -> Checkpoint:
    """The base of an adapter: that given, or the one that the adapter names."""
    if base:
        return Checkpoint.open(base)
    hint = "name its base with --base"
    if not adapter.base_model_name_or_path:
        raise HFTError(f"{name} does not say what it was trained on; {hint}")
    try:
        return Checkpoint.open(adapter.base_model_name_or_path, adapter.revision)
    except HFTError as error:
        raise HFTError(f"the base of {name} cannot be read: {error}; {hint}") from error


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
            raise HFTError(
                f"{adapter} changes {key} or {owner}, which {base.name} ties; save the base with the two untied first"
            )
    if wrong := [key for key in base.parameters if state[key].shape != base.specs[key].shape]:
        raise HFTError(f"{adapter} changes the shape of {wrong[0]}; only adapters that keep all shapes can be merged")
    return state
