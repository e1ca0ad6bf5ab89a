"""What a continual-learning strategy is: the rows of each run in a sequence of tasks, and additions to its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hft.config import option
from hft.methods.part import MethodPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Trainer, TrainerCallback

# `prompt`, `completion` and, where it matters, `task`.
Row = dict[str, str]


@dataclass(frozen=True)
class ExtraRows:
    """What a strategy computes in a run besides the run's own batches, for its plan."""

    per_step: int = 0  # rows with gradients, over all processes
    length: int | None = None  # tokens of each; by default as many as the run's own may have
    reference: bool = False  # whether another model, which is kept, computes them too
    sampled: int = 0  # rows that the model writes before the first step


@dataclass
class Strategy(MethodPart):
    """Sequential fine-tuning, and the base class of all other continual-learning strategies.

    `hft continual` asks for rows before each round. A strategy that does more than choose rows sets `acts_on_steps`: it
    becomes a key of the run, and its `callbacks` see every step.

    Attributes:
        acts_on_steps: whether it acts within a run, in addition to choosing rows.
        takes_adapter: whether it carries an adapter from task to task.
        takes_alignment: whether it trains on rows of general instructions, if there are any.
    """

    kind: ClassVar[str] = "strategy"
    acts_on_steps: ClassVar[bool] = False
    takes_adapter: ClassVar[bool] = False
    takes_alignment: ClassVar[bool] = False

    carry_moments: bool = option(
        "Start each round with AdamW's moments of the round before, as TRACE does.", False, kw_only=True
    )
    strategy_data: str | None = option("Rows of earlier tasks, written by hft continual.", kw_only=True)
    previous_run: str | None = option("The run whose adapter is trained on, given by hft continual.", kw_only=True)

    def training_rows(self, tasks: Sequence[list[Row]], alignment: list[Row]) -> list[Row]:
        """The rows that a round trains on, by default those of its task.

        Args:
            tasks: the training rows of each task so far; the last one is to be learned.
            alignment: rows of general instructions.
        """
        return tasks[-1]

    def replay_rows(self, tasks: Sequence[list[Row]], alignment: list[Row]) -> list[Row]:
        """The rows of a pass of one epoch after the round, with the same selection; by default none."""
        return []

    def remembered_rows(self, tasks: Sequence[list[Row]]) -> list[Row]:
        """The rows that become `strategy_data` of the round's run; by default none."""
        return []

    def extra_rows(self) -> ExtraRows:
        """The rows that it computes in addition to the run's own; by default none."""
        return ExtraRows()

    def callbacks(self, trainer: Trainer) -> list[TrainerCallback]:
        """What a run needs. The trainer is ready to train, with the base's weights."""
        from hft.methods.moments import CarryMoments

        return [CarryMoments(self.previous_run or trainer.manifest.base)] if self.carry_moments else []
