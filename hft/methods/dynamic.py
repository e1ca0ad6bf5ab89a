"""Dynamic freezing (paper A.4.11, Table 22): everything trains at first, and less after each part of the run.

After each tenth of the run a tenth of the layers' parameters freezes, in whole units, drawn at random: the paper does
not say which. Embeddings, head and final norm train throughout, as under HFT.
"""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveInt

from hft.config import option
from hft.methods.schedule import Schedule, outside_layers
from hft.model.anatomy import Unit
from hft.selection import Selection
from hft.selection.policies import sample_names


@dataclass
class Dynamic(Schedule):
    name: ClassVar[str] = "dynamic"

    intervals: PositiveInt = option("Parts of the run, of equal length; units freeze in between.", 10)
    schedule_seed: int = option("Seed of the draw, independent of the training seed.", 0)

    def trained_at(self, selection: Selection, step: int, steps: int) -> frozenset[str]:
        groups: dict[tuple[str, ...], list[Unit]] = {}  # of units that share parameters, which freeze together
        for unit in selection.anatomy.units:
            groups.setdefault(unit.parameters, []).append(unit)
        by_name = {units[0].name: units for units in groups.values()}
        frozen = selection.anatomy.numel_in_layers * self.interval_at(steps, step) / self.intervals
        trained, size = outside_layers(selection), 0
        for name in sample_names(by_name, len(by_name), "dynamic", self.schedule_seed, selection.config.round):
            group_size = sum(unit.numel for unit in by_name[name])
            if size + group_size / 2 > frozen:
                trained += [unit.name for unit in by_name[name]]
            size += group_size
        return frozenset(trained)
