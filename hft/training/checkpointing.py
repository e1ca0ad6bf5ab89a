"""Activation checkpointing of some layers, and of the same ones in every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import TrainerCallback

from hft.model.anatomy import layers_of


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
