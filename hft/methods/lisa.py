"""LISA (arXiv 2403.17919): a few layers train at a time, drawn uniformly every few steps.

Embeddings, final norm and head always train.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveInt

from hft.config import option
from hft.errors import HFTError
from hft.methods.schedule import Schedule, layer_sizes, outside_layers, units_of_layers
from hft.selection import Selection
from hft.selection.policies import sample_names


@dataclass
class Lisa(Schedule):
    name: ClassVar[str] = "lisa"

    switch_every: PositiveInt = option("Steps after which other layers train.", 20)
    active_layers: int = option("Layers that train at a time.", 2)
    optimizer_state: Literal["reset", "keep", "offload"] = option(
        "What becomes of the optimizer state of a layer that freezes: reset deletes it, keep keeps it, "
        "offload keeps it in host memory.",
        "reset",
    )
    schedule_seed: int = option("Seed of the draw, independent of the training seed.", 0)

    def check(self, selection: Selection) -> None:
        super().check(selection)
        layers = selection.anatomy.num_layers
        if not 1 <= self.active_layers <= layers:
            raise HFTError(f"active_layers is {self.active_layers}, but the model has {layers} layers; give 1 or more")

    def trained_at(self, selection: Selection, step: int, steps: int) -> frozenset[str]:
        names = map(str, range(selection.anatomy.num_layers))
        key = ("lisa", self.schedule_seed, selection.config.round, self.interval_at(steps, step))
        layers = map(int, sample_names(names, self.active_layers, *key))
        return units_of_layers(selection, layers).union(outside_layers(selection))

    def peak_numel(self, selection: Selection) -> int:
        if self.optimizer_state == "keep":
            return selection.num_trained
        outside = selection.num_trained - selection.num_trained_in_layers
        return sum(sorted(layer_sizes(selection))[-self.active_layers :]) + outside
