"""What a model is trained on: one file per objective, named as its command."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments


@dataclass(frozen=True)
class Objective:
    """An objective as data. Its trainer and its config are imported when they are asked for.

    Attributes:
        name: the command, `hft NAME`, and the name of its recipes.
        description: one line for `hft --help`.
        trainer_name: its trainer; its config is named likewise.
        reader: of `hft.data.rows`, which checks a dataset and brings it into the form that the trainer reads.
        unit: what a row of the dataset is called.
        sequences: that a row puts through the model with gradients.
        forward_sequences: that it puts through the policy without gradients.
        reference_sequences: that it puts through a reference model; 0 if the objective has none.
        reference_key: the key that gives it a reference, if it has none without.
        pads: whether TRL 1.16 pads its rows whatever `padding_free` says.
        module: where its trainer and its config are.
        held_out: metrics whose held-out values a run ends with.
        not_at_start: those of them that mean nothing before the first step.
        order: among the objectives of a model, in reports.
        linestyle: matplotlib's, in figures.
    """

    name: str
    description: str
    trainer_name: str
    reader: str
    unit: str = "rows"
    sequences: int = 1
    forward_sequences: int = 0
    reference_sequences: int = 0
    reference_key: str | None = None
    pads: bool = False
    module: str = "trl"
    held_out: tuple[str, ...] = ("loss",)
    not_at_start: tuple[str, ...] = ()
    order: int = 0
    linestyle: str = "-"

    @property
    def trainer(self) -> type[Trainer]:
        """Its trainer, one of TRL's or a subclass."""
        return getattr(import_module(self.module), self.trainer_name)

    @property
    def config(self) -> type[TrainingArguments]:
        """The trainer's config."""
        return getattr(import_module(self.module), self.trainer_name.replace("Trainer", "Config"))

    @property
    def read_rows(self) -> Callable[[Dataset, str], tuple[Dataset, list[str]]]:
        """The function that checks a dataset's rows and brings them into the form that the trainer takes."""
        return getattr(import_module("hft.data.rows"), self.reader)

    def has_reference(self, values: dict[str, Any]) -> bool:
        """Whether a run with these settings keeps a reference model beside the policy."""
        has_one = self.reference_sequences > 0 and (self.reference_key is None or bool(values.get(self.reference_key)))
        return has_one and not values.get("precompute_ref_log_probs")


OBJECTIVES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@functools.cache
def find_objective(name: str) -> Objective:
    return import_module(f"{__name__}.{name}").OBJECTIVE
