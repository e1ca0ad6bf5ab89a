"""Activation checkpointing: which layers, checked before a run and kept the same in every step."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from hft.errors import HFTError, shorten
from hft.model.anatomy import layers_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Of `activation_checkpointing_kwargs`: transformers' own keys, and then torch's.
TRANSFORMERS_KEYS = ("every_n_layers", "offload")
TORCH_KEYS = [name for name in inspect.signature(checkpoint).parameters if name not in ("function", "args", "kwargs")]
TORCH_KEYS.append("preserve_rng_state")  # one of its **kwargs


def check_checkpointing(args: TrainingArguments, *, selective: bool) -> None:
    """Refuse settings of activation checkpointing that would only fail in the first step.

    A `selective` trainer can save attention alone, as TRL's SFTTrainer can.
    """
    given = args.activation_checkpointing_kwargs or {}
    known = [*TRANSFORMERS_KEYS, *TORCH_KEYS, *(["selective"] if selective else [])]
    if unknown := [key for key in given if key not in known]:
        raise HFTError(f"activation_checkpointing_kwargs has no {unknown[0]!r}; it has {shorten(known, most=9)}")
    every = given.get("every_n_layers", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise HFTError(f"every_n_layers must be an integer of at least 1, got {every!r}")
    if given.get("offload") and not torch.accelerator.is_available():
        raise HFTError("offload moves activations to the memory of the CPU, and there is no GPU here; leave it out")


def checkpointed_layers(args: TrainingArguments, num_layers: int, first: int | None = None) -> range:
    """The indices of the checkpointed layers; `first` is how many are, from the first on, if the config says so."""
    kwargs = args.activation_checkpointing_kwargs or {}
    if first is not None and not 0 <= first <= num_layers:
        raise HFTError(f"activation_checkpointing_layers must lie in 0..{num_layers}, the model's layers, got {first}")
    if first is not None and "every_n_layers" in kwargs:
        raise HFTError("activation_checkpointing_layers and every_n_layers both say which layers; give one of them")
    if not args.activation_checkpointing:
        return range(0)
    return range(first) if first is not None else range(0, num_layers, kwargs.get("every_n_layers", 1))


class CheckpointedLayers(TrainerCallback):
    """Keeps which layers are checkpointed, once Trainer has switched checkpointing on.

    TRL (1.16) switches checkpointing off while a reference computes or a model generates, and on again in every layer,
    without `offload`, and with keys that torch does not know, so that the next step would fail.

    Args:
        count: checkpoint the first so many layers only; by default those that Trainer chose. It makes no difference to
            the peak which layers keep their activations: all are alive when the backward pass begins.
    """

    def __init__(self, count: int | None = None):
        self.count = count

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.count is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's adapter
            for index, layer in enumerate(layers_of(base)):
                layer.gradient_checkpointing = index < self.count
        keep_checkpointing(model)


def keep_checkpointing(model: nn.Module) -> None:
    """Let switching checkpointing on restore what switching it off has switched off."""
    switched_off: list[nn.Module] = []

    def switch_off() -> None:
        switched_off[:] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in switched_off:
            module.gradient_checkpointing = False

    def switch_on(*args, **kwargs) -> None:
        for module in switched_off:
            module.gradient_checkpointing = True

    model.gradient_checkpointing_disable, model.gradient_checkpointing_enable = switch_off, switch_on
