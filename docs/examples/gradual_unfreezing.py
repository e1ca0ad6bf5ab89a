"""A schedule: layers start to train one after the other, the last one first (ULMFiT, arXiv 1801.06146)."""

from __future__ import annotations

from dataclasses import dataclass

from hft.config import option
from hft.methods.schedule import Schedule, outside_layers, units_of_layers
from hft.selection import Selection


@dataclass
class GradualUnfreezing(Schedule):
    switch_every: int = option("Steps after which one more layer trains.", 20)

    def trained_at(self, selection: Selection, step: int, steps: int) -> frozenset[str]:
        last = selection.anatomy.num_layers - 1
        layers = range(max(0, last - self.interval_at(steps, step)), last + 1)
        return units_of_layers(selection, layers).union(outside_layers(selection))
