"""What an update is: changes to the weights around `optimizer.step()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from hft.methods.part import MethodPart

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from hft.model.anatomy import Anatomy
    from hft.selection import Selection


@dataclass
class Update(MethodPart):
    """A change to the trained weights around `optimizer.step()`. A subclass defines `callbacks`.

    Attributes:
        replicated: whether its state is replicated on every device under FSDP2, not sharded.
    """

    kind: ClassVar[str] = "update"
    replicated: ClassVar[bool] = False

    def callbacks(self, model: nn.Module, anatomy: Anatomy) -> list[TrainerCallback]:
        """The trainer's callbacks. The model is frozen and has the base's weights, in the dtype they were loaded in."""
        raise NotImplementedError(f"{type(self).__name__} must define callbacks")

    def check(self, model: nn.Module, selection: Selection) -> None:
        """Raise an `HFTError` for a model, which may be on `meta`, that it cannot work with."""


def copies(model: nn.Module, names: set[str] | None = None) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters, or of those among some names, in the dtype they have now."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)}
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether fp16's gradient scaler skipped the last step, since a gradient was infinite."""
    return getattr(optimizer, "step_was_skipped", False)
