"""Callbacks that keep and check what is frozen while a run trains."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from hft.freezing import PartFreezer, check_frozen
from hft.selection import Selection


class PartFreezing(TrainerCallback):
    """Keeps the frozen elements of partly frozen parameters in place while a run trains."""

    def __init__(self, selection: Selection, dtypes: dict[str, torch.dtype]):
        self.selection, self.dtypes = selection, dtypes

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.freezer = PartFreezer(model, self.selection.frozen_masks, self.dtypes)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.freezer.restore()

    def on_train_end(self, args, state, control, **kwargs):
        self.freezer.remove()


class FreezeCheck(TrainerCallback):
    """Checks, once the engine has prepared the model, that what should be frozen is, and that the rest trains."""

    def __init__(self, selection: Selection):
        self.selection = selection

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_frozen(model, self.selection)
