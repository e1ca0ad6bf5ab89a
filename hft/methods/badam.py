"""BAdam (arXiv 2404.02827): one block of parameters trains at a time, each with fresh optimizer state.

A layer is a block, and embeddings, final norm and head together are one, unless `freeze_embeddings` is set.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveInt

from hft.config import option
from hft.methods.schedule import Schedule, layer_sizes, outside_layers, units_of_layers
from hft.selection import Selection
from hft.selection.policies import sample_names


@dataclass
class BAdam(Schedule):
    name: ClassVar[str] = "badam"
    clears_state: ClassVar[bool] = True

    switch_every: PositiveInt = option("Steps after which the next layer trains.", 50)
    block_order: Literal["random", "ascending", "descending"] = option(
        "Order of the layers; random: a new order per pass.", "random"
    )
    schedule_seed: int = option("Seed of the draw, independent of the training seed.", 0)

    def trained_at(self, selection: Selection, step: int, steps: int) -> frozenset[str]:
        blocks = selection.anatomy.num_layers + (not selection.config.freeze_embeddings)
        turn, position = divmod(self.interval_at(steps, step), blocks)
        order = range(blocks)
        if self.block_order == "random":
            order = sample_names(map(str, order), blocks, "badam", self.schedule_seed, selection.config.round, turn)
        block = int(order[blocks - 1 - position if self.block_order == "descending" else position])
        return units_of_layers(selection, [block]) or frozenset(outside_layers(selection))

    def peak_numel(self, selection: Selection) -> int:
        return max(*layer_sizes(selection), selection.num_trained - selection.num_trained_in_layers)
