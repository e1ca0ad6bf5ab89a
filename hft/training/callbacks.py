"""Keeps and checks what is frozen while a run trains."""

import torch
from transformers import TrainerCallback

from hft.freezing import PartFreezer, check_frozen
from hft.selection import Selection


class KeepFrozen(TrainerCallback):
    """Keeps frozen elements of partly frozen parameters in place, and checks that the others are frozen as they should.

    It does both once the engine has prepared the model. A schedule changes what is frozen, and needs no check.
    """

    def __init__(self, selection: Selection, dtypes: dict[str, torch.dtype], *, check: bool):
        self.selection, self.dtypes, self.check = selection, dtypes, check

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.check:
            check_frozen(model, self.selection)
        self.freezer = PartFreezer(model, self.selection.frozen_masks, self.dtypes)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.freezer.restore()

    def on_train_end(self, args, state, control, **kwargs):
        self.freezer.remove()
