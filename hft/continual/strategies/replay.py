"""Replay: a part of each earlier task's rows, and general instructions, are trained on again (paper section 4.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from hft.config import Fraction, option
from hft.methods.strategy import Row, Strategy


@dataclass
class Replay(Strategy):
    """Train on the first rows of earlier tasks again, after each round or within it.

    `after` is TRACE's code: after each round one epoch over the first 10% of each earlier task and all of LIMA. The
    paper does not say when. `mixed` puts the same rows among those of the round.
    """

    name: ClassVar[str] = "replay"
    takes_alignment: ClassVar[bool] = True

    replay_mode: Literal["after", "mixed"] = option(
        "after: a separate pass after each round; mixed: among the round's rows.", "after"
    )
    replay_fraction: Fraction = option("Fraction of each earlier task's rows.", 0.1)

    def training_rows(self, tasks: Sequence[list[Row]], alignment: list[Row]) -> list[Row]:
        return tasks[-1] + (self.memory_of(tasks, alignment) if self.replay_mode == "mixed" else [])

    def replay_rows(self, tasks: Sequence[list[Row]], alignment: list[Row]) -> list[Row]:
        return self.memory_of(tasks, alignment) if self.replay_mode == "after" else []

    def memory_of(self, tasks: Sequence[list[Row]], alignment: list[Row]) -> list[Row]:
        earlier = [row for rows in tasks[:-1] for row in rows[: math.ceil(self.replay_fraction * len(rows))]]
        return earlier + alignment
