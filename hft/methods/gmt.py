"""GMT (arXiv 2406.15330): in each step only the entries of each tensor with the largest gradient move.

The gradient is that of the global batch, clipped; the moments see what is left of it.
"""

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
    name: ClassVar[str] = "gmt"

    def before_step(self, parameter: nn.Parameter) -> torch.Tensor:
        moving = self.largest(parameter.grad)
        parameter.grad.copy_(torch.where(moving, parameter.grad, torch.zeros_like(parameter.grad)))
        return moving

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if args.fp16:
            raise HFTError("gmt would hide infinite gradients from fp16's loss scaler; set bf16")

    def memory(self, selection: Selection) -> int:
        return 5 * selection.num_trained  # the weights before the step, and a mask
