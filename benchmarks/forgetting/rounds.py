"""HFT in rounds: another random half of every layer trains after every few steps, as in consecutive runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hft.config import option
from hft.methods.schedule import Schedule, outside_layers
from hft.selection import Selection, select


@dataclass
class Rounds(Schedule):
    switch_every: int = option("Steps of a round, after which another half trains.", 200)

    def trained_at(self, selection: Selection, step: int, steps: int) -> frozenset[str]:
        config = replace(selection.config, policy="category", round=1 + self.interval_at(steps, step))
        return select(selection.anatomy, config).trained_units.union(outside_layers(selection))
