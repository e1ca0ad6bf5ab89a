"""GEM (Lopez-Paz and Ranzato 2017, arXiv 1706.08840; paper section 4.2): no step raises the loss on earlier tasks.

A few rows of each earlier task are kept. Before each step the gradient m_k of the loss on the rows of each task k is
computed again. If the step's gradient g would raise any of these losses to first order, that is g . m_k < 0, the step
takes the closest gradient to g that raises none:

    min ||z - g||^2  subject to  z . m_k >= 0 for every k.

Its dual has one variable per task: z = g + sum_k v_k m_k, where v >= 0 minimizes ||g + sum_k v_k m_k||^2. As the
authors' code does, a margin bounds v from below, which moves z further away from what would forget. TRACE's GEM
differs: its program has the opposite sign, and its memory is one gradient that is never computed again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from transformers import TrainerCallback

from hft.config import option
from hft.continual.gradients import TokenizedRow, dot_products, loss_gradient, take_gradient, tokenized
from hft.errors import HFTError
from hft.jsonl import read_jsonl
from hft.methods.strategy import ExtraRows, Row, Strategy
from hft.selection import Selection

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


@dataclass
class GEM(Strategy):
    """Project each step's gradient so that no earlier task's loss rises. All gradients are of what trains now."""

    name: ClassVar[str] = "gem"
    acts_on_steps: ClassVar[bool] = True

    memory_rows: PositiveInt = option("Rows to remember per task (32 is our value).", 32)
    memory_seed: int = option("Seed for choosing them.", 0)
    gem_margin: NonNegativeFloat = option("Lower bound of the dual variables; 0.5 as in GEM's code.", 0.5)

    def remembered_rows(self, tasks: Sequence[list[Row]]) -> list[Row]:
        chosen = []
        for number, rows in enumerate(tasks[:-1]):
            some = random.Random(f"{self.memory_seed} {number}").sample(rows, min(self.memory_rows, len(rows)))
            chosen += [row | {"task": str(number)} for row in some]
        return chosen

    def remembered(self) -> list[Row]:
        return read_jsonl(self.strategy_data) if self.strategy_data else []

    def callbacks(self, trainer: Trainer) -> list[TrainerCallback]:
        return [*super().callbacks(trainer), *([Projection(self, trainer)] if self.strategy_data else [])]

    def constraints(self, tasks: list[list[TokenizedRow]], step: int) -> list[list[TokenizedRow]]:
        """The sets of remembered rows whose losses a step may not raise, given those of each task."""
        return tasks

    def weights(self, gram: torch.Tensor) -> list[float]:
        """The weight of each memory gradient, given the Gram matrix of g and these."""
        return dual_variables(gram[1:, 1:], gram[1:, 0], self.gem_margin).tolist()

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if args.fp16:
            raise HFTError(f"{self.name} compares gradients, which fp16 scales; train in bf16 or fp32")

    def memory(self, selection: Selection) -> int:
        tasks = {row["task"] for row in self.remembered()}
        return 4 * len(tasks) * selection.num_trained  # fp32: every m_k; g is the gradient that the run has

    def extra_rows(self) -> ExtraRows:
        return ExtraRows(len(self.remembered()))


class Projection(TrainerCallback):
    """Replaces the gradient of each step, after accumulation and clipping, by its projection."""

    def __init__(self, strategy: GEM, trainer: Trainer):
        self.strategy, self.trainer = strategy, trainer
        tokenizer, longest = trainer.processing_class, trainer.args.max_length
        tasks = groupby(strategy.remembered(), key=lambda row: row["task"])
        self.tasks = [[tokenized(row, tokenizer, longest) for row in rows] for _, rows in tasks]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        gradient = take_gradient(parameters)
        constraints = self.strategy.constraints(self.tasks, state.global_step)
        memory_gradients = [loss_gradient(self.trainer, rows, parameters) for rows in constraints]
        weights = self.strategy.weights(dot_products([gradient, *memory_gradients], args.device))
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient[index]
            for weight, memory_gradient in zip(weights, memory_gradients, strict=True):
                if weight:
                    parameter.grad.add_(memory_gradient[index], alpha=weight)


def dual_variables(gram: torch.Tensor, products: torch.Tensor, margin: float) -> torch.Tensor:
    """The v of GEM's dual: argmin ||g + sum_k v_k m_k||^2 over v >= margin; zeros if nothing conflicts.

    `gram` is m_j . m_k, (tasks, tasks), `products` m_k . g, (tasks,). With v = u + margin it is non-negative least
    squares in u, with as many rows as there are tasks, since only inner products enter.
    """
    from scipy.optimize import nnls

    if (products >= 0).all():
        return torch.zeros_like(products)
    linear = products + margin * gram.sum(dim=1)  # m_k . (g + margin * sum_j m_j)
    # gram = R^T R with R = sqrt(values) * vectors^T, so ||R u + R^-T linear||^2 differs by a constant.
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    solution, _ = nnls((roots[:, None] * vectors.T).numpy(), -(vectors.T @ linear / roots).numpy())
    return torch.from_numpy(solution) + margin
