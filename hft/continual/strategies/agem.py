"""A-GEM, averaged GEM (Chaudhry et al. 2019, arXiv 1812.00420): one constraint on a random batch of the memory."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt

from hft.config import option
from hft.continual.gradients import TokenizedRow
from hft.continual.strategies.gem import GEM
from hft.methods.strategy import ExtraRows
from hft.selection import Selection


@dataclass
class AGEM(GEM):
    """Remove from each step's gradient g what would raise the mean loss over all earlier tasks.

    z = g - (g . m / m . m) m if g . m < 0, else g, where m is the gradient on a batch that is drawn again in each step
    from the rows of all earlier tasks.
    """

    name: ClassVar[str] = "agem"

    gem_margin: ClassVar[float] = 0.0
    memory_batch: PositiveInt = option("Remembered rows per step (32 is our value).", 32)

    def constraints(self, tasks: list[list[TokenizedRow]], step: int) -> list[list[TokenizedRow]]:
        rows = [row for task in tasks for row in task]
        return [random.Random(f"{self.memory_seed} {step}").sample(rows, min(self.memory_batch, len(rows)))]

    def weights(self, gram: torch.Tensor) -> list[float]:
        (_, product), (_, square) = gram.tolist()
        return [-product / square if product < 0 else 0.0]

    def memory(self, selection: Selection) -> int:
        return 4 * selection.num_trained if self.strategy_data else 0  # fp32: m

    def extra_rows(self) -> ExtraRows:
        return ExtraRows(min(self.memory_batch, super().extra_rows().per_step))
