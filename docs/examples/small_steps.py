"""An update: no step moves a tensor by more than a fraction of its norm (the trust ratio of LARS, arXiv 1708.03888)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from hft.config import option
from hft.methods.update import Update
from hft.selection import Selection


@dataclass
class SmallSteps(Update):
    trust_ratio: float = option("Largest norm of a step / norm of the tensor.", 0.001)

    def callbacks(self, model, anatomy) -> list[TrainerCallback]:
        return [ScaleSteps(self.trust_ratio)]

    def memory(self, selection: Selection) -> int:
        return 4 * selection.num_trained  # the fp32 weights before the step


class ScaleSteps(TrainerCallback):
    def __init__(self, ratio: float):
        self.ratio, self.before = ratio, {}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = {parameter: parameter.clone() for parameter in model.parameters() if parameter.grad is not None}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for parameter, before in self.before.items():
            step = parameter - before
            largest = self.ratio * before.norm()
            if step.norm() > largest:
                parameter.copy_(before + step * (largest / step.norm()))
        self.before = {}
