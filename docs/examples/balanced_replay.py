"""A strategy: each round also trains on as many rows of earlier tasks as its own task has, taken from all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hft.config import option
from hft.methods.strategy import Row, Strategy


@dataclass
class BalancedReplay(Strategy):
    replay_seed: int = option("Seed for choosing them.", 0)

    def training_rows(self, tasks: Sequence[list[Row]], alignment: list[Row]) -> list[Row]:
        earlier = [row for rows in tasks[:-1] for row in rows]
        rng = random.Random(f"{self.replay_seed} {len(tasks)}")
        return tasks[-1] + rng.sample(earlier, min(len(tasks[-1]), len(earlier)))
