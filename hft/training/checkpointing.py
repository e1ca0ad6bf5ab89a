"""Activation checkpointing: which layers, checked before the run, and the same ones in every step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainingArguments

from hft.errors import HFTError, shorten
from hft.model.anatomy import layers_of

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
    return range(0, num_layers, kwargs.get("every_n_layers", 1))  # as transformers does


class CheckpointedLayers(TrainerCallback):
    """Leaves checkpointing on in the first layers only, once Trainer has switched it on in all of them.

    It makes no difference to the peak which layers keep their activations: all are alive when the backward pass begins.

    Args:
        count: how many layers.
    """

    def __init__(self, count: int):
        self.count = count

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's adapter
        for index, layer in enumerate(layers_of(base)):
            layer.gradient_checkpointing = index < self.count


class KeepsCheckpointing:
    """Mixin of TRL's `DPOTrainer` that keeps which layers are checkpointed, and how.

    TRL (1.16) switches checkpointing off while the reference computes. It switches it on again in every layer, without
    `offload`, and with keys that torch does not know, so that the next step would fail.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss."""
        with kept_checkpointing(self.model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def compute_ref_log_probs(self, model, inputs):
        """TRL's log-probabilities of the reference, computed beforehand."""
        with kept_checkpointing(self.model):
            return super().compute_ref_log_probs(model, inputs)


@contextmanager
def kept_checkpointing(model: nn.Module) -> Iterator[None]:
    """Put back at the end which layers of a model are checkpointed, and how."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, name, vars(module)[name]) for module in model.modules() for name in names if name in vars(module)
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
