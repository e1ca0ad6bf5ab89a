"""Which layers compute their activations again in the backward pass, instead of keeping them, by a run's settings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from hft.errors import HFTError, shorten
from hft.planning.costs import layers_to_checkpoint

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Of `activation_checkpointing_kwargs`: transformers' own keys, and then torch's.
TRANSFORMERS_KEYS = ("every_n_layers", "offload")
TORCH_KEYS = [name for name in inspect.signature(checkpoint).parameters if name not in ("function", "args", "kwargs")]
TORCH_KEYS.append("preserve_rng_state")  # one of its **kwargs


def check_checkpointing(args: TrainingArguments, *, pairs: bool) -> None:
    """Refuse settings of activation checkpointing that would only fail in the first step.

    Args:
        args: the trainer's config.
        pairs: whether it trains on pairs of answers.

    Raises:
        HFTError: an unknown key, no number of layers, or nowhere to offload to.
    """
    given = args.activation_checkpointing_kwargs or {}
    known = [*TRANSFORMERS_KEYS, *TORCH_KEYS, *([] if pairs else ["selective"])]  # TRL's SFT has one more
    if unknown := [key for key in given if key not in known]:
        raise HFTError(f"activation_checkpointing_kwargs has no {unknown[0]!r}; it has {shorten(known, most=9)}")
    every = given.get("every_n_layers", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise HFTError(f"every_n_layers must be an integer of at least 1, got {every!r}")
    if given.get("offload") and not torch.accelerator.is_available():
        raise HFTError("offload moves activations to the memory of the CPU, and there is no GPU here; leave it out")


def checkpointed_layers(args: TrainingArguments, num_layers: int, first: int | None = None) -> range:
    """The indices of the checkpointed layers.

    Args:
        args: the trainer's config.
        num_layers: of the model.
        first: how many layers are checkpointed, from the first on, if the config says so.

    Raises:
        HFTError: the model has fewer layers, or `every_n_layers` is given too.
    """
    kwargs = args.activation_checkpointing_kwargs or {}
    if first is not None and not 0 <= first <= num_layers:
        raise HFTError(f"activation_checkpointing_layers must lie in 0..{num_layers}, the model's layers, got {first}")
    if first is not None and "every_n_layers" in kwargs:
        raise HFTError("activation_checkpointing_layers and every_n_layers both say which layers; give one of them")
    if not args.activation_checkpointing:
        return range(0)
    if first is not None:
        return range(first)
    return layers_to_checkpoint(num_layers, every=kwargs.get("every_n_layers", 1))
