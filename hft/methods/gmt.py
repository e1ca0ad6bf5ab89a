"""GMT (arXiv 2406.15330): in each step only the entries of each tensor with the largest gradient move."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import TrainingArguments

from hft.errors import HFTError
from hft.methods.topk import TopK
from hft.selection import Selection


@dataclass
class GMT(TopK):
    """Gradient-mask tuning: the moments see the masked gradient.

    Ranked is the gradient accumulated over the global batch and clipped. Clipping scales it as a whole, so it ranks as
    before, but the norm is that of the whole gradient.
    """

    name: ClassVar[str] = "gmt"
    description: ClassVar[str] = "of each tensor only the entries with the largest gradient move in a step"

    def before_step(self, parameter: nn.Parameter) -> torch.Tensor:
        moving = self.largest(parameter.grad)
        parameter.grad.copy_(torch.where(moving, parameter.grad, torch.zeros_like(parameter.grad)))
        return moving

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if args.fp16:
            raise HFTError("gmt would hide infinite gradients from fp16's loss scaler; set bf16")

    def memory(self, selection: Selection) -> int:
        return 5 * selection.num_trained  # the weights before the step, and a mask
