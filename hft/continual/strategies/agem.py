"""A-GEM, averaged GEM (Chaudhry et al. 2019, arXiv 1812.00420): one constraint on a random batch of the memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from transformers import TrainerCallback

from hft.continual.gradients import (
    MicroBatches,
    dot_products,
    loss_gradient,
    take_gradient,
    tokenized,
    with_gradient,
)
from hft.continual.strategies.gem import GEM
from hft.jsonl import read_jsonl
from hft.methods.strategy import Strategy
from hft.selection import Selection

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class AGEM(GEM):
    """Remove from each step's gradient g what would raise the mean loss over all earlier tasks.

    z = g - (g . m / m . m) m if g . m < 0, else g, where m is the gradient on a batch that is drawn again for each step
    from the rows of all earlier tasks.
    """

    name: ClassVar[str] = "agem"
    description: ClassVar[str] = "no step raises the mean loss on a batch of remembered rows"

    gem_margin: ClassVar[float] = 0.0
    memory_batch: int = field(default=32, metadata={"help": "Remembered rows that each step looks at (32 is ours)."})

    def callbacks(self, trainer: Trainer) -> list[TrainerCallback]:
        if not self.strategy_data:
            return Strategy.callbacks(self, trainer)
        tokenizer, longest = trainer.processing_class, trainer.args.max_length
        rows = [tokenized(row, tokenizer, longest) for row in read_jsonl(self.strategy_data)]
        return [*Strategy.callbacks(self, trainer), AveragedProjection(trainer, rows, self)]

    def memory(self, selection: Selection) -> int:
        return 8 * selection.num_with_optimizer_state if self.strategy_data else 0  # fp32: g and m


class AveragedProjection(TrainerCallback):
    """Replaces the gradient of each step, after accumulation and clipping, by its projection."""

    def __init__(self, trainer: Trainer, rows: list[dict[str, list[int]]], strategy: AGEM):
        self.trainer, self.rows, self.strategy = trainer, rows, strategy

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        drawn = random.Random(f"{self.strategy.memory_seed} {state.global_step}")
        rows = drawn.sample(self.rows, min(self.strategy.memory_batch, len(self.rows)))
        parameters = with_gradient(model)
        gradient = take_gradient(parameters)
        memory_gradient = loss_gradient(MicroBatches(self.trainer, rows), parameters)
        (_, product), (_, square) = dot_products([gradient, memory_gradient], args.device).tolist()
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient[index]
            if product < 0:
                parameter.grad.add_(memory_gradient[index], alpha=-product / square)
