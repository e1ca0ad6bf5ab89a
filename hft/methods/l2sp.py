"""L2-SP (arXiv 1802.01483): after each step every trained weight is pulled toward where it started.

W <- W - lr * strength * (W - W0), decoupled from the gradient as AdamW decouples weight decay. W0 is this run's base,
in the dtype it was loaded in: 13.5 GB for Llama-2-7B, half of that where half is frozen.
"""

from dataclasses import MISSING, dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import nn
from transformers import TrainerCallback

from hft.config import option
from hft.freezing import sharded_like
from hft.methods.update import Update, copies, was_skipped
from hft.model.anatomy import Anatomy
from hft.selection import Selection


@dataclass
class L2SP(Update):
    name: ClassVar[str] = "l2sp"

    l2sp_strength: PositiveFloat = option(
        "Fraction of the way back to the start per step, as a multiple of the learning rate.", MISSING
    )

    def callbacks(self, model: nn.Module, anatomy: Anatomy) -> list[TrainerCallback]:
        return [Pull(copies(model), self.l2sp_strength)]

    def memory(self, selection: Selection) -> int:
        return 2 * selection.num_trained


class Pull(TrainerCallback):
    """Pulls the weights toward `start` after each step."""

    def __init__(self, start: dict[str, torch.Tensor], strength: float):
        self.start, self.strength = start, strength

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if name in self.start:
                self.start[name] = sharded_like(self.start[name], parameter)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if was_skipped(optimizer):
            return
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # otherwise a schedule has frozen it for now
                    parameter.sub_(group["lr"] * self.strength * (parameter - self.start[names[parameter]]))
