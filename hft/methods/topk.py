"""Updates in which only the largest entries of each tensor move in a step: the base of MoFO and GMT."""

from dataclasses import MISSING, dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from transformers import TrainerCallback

from hft.config import option
from hft.freezing import sharded_like, whole
from hft.methods.update import Update, was_skipped
from hft.model.anatomy import Anatomy
from hft.selection.masks import largest


@dataclass
class TopK(Update):
    """Only a fraction of the entries of each tensor moves in a step."""

    top_fraction: Annotated[float, Field(gt=0, le=1)] = option(
        "Fraction of each tensor's trained entries that move in a step.", MISSING
    )

    def before_step(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The entries that move, if that is known before the optimizer's step; may change the gradient."""

    def after_step(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """The entries that move, where `before_step` did not say; None where all do."""

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """A mask of the entries that are largest in magnitude; of equal ones those with the lowest flat index."""
        moving = largest(whole(values).abs(), max(1, round(self.top_fraction * values.numel())))
        return sharded_like(moving, values)

    def callbacks(self, model: nn.Module, anatomy: Anatomy) -> list[TrainerCallback]:
        return [MoveLargest(self)]


class MoveLargest(TrainerCallback):
    """Puts every other entry back after the step: it keeps its bits, whatever momentum and weight decay do.

    That takes a copy of the trained weights during the step: 4 bytes per entry of an fp32 master.
    """

    def __init__(self, update: TopK):
        self.update = update
        self._before: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._before[parameter] = parameter.clone(), self.update.before_step(parameter)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not was_skipped(optimizer):
            for parameter, (before, known) in self._before.items():
                moving = self.update.after_step(parameter, optimizer) if known is None else known
                if moving is not None:
                    parameter.copy_(torch.where(moving, parameter, before))
        self._before.clear()
