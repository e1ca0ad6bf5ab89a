"""MoFO (arXiv 2407.20999): in each step only the entries of each tensor with the largest momentum move.

The moments see the whole gradient; the momentum is that after this step's gradient. Norms and biases move as a whole,
as in the official optimizer, which decays all weights in each step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import TrainingArguments

from hft.errors import HFTError
from hft.methods.topk import TopK
from hft.selection import Selection

# Optimizers that keep a plain tensor of each parameter's momentum.
MOMENTUM = ("adamw_torch", "adamw_torch_fused")


@dataclass
class MoFO(TopK):
    name: ClassVar[str] = "mofo"

    def after_step(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        if parameter.ndim == 1:
            return None
        state = optimizer.state[parameter]
        return self.largest(state["exp_avg" if "exp_avg" in state else "momentum_buffer"])

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if args.optim not in MOMENTUM:
            raise HFTError(f"mofo needs AdamW's momentum; set optim to {' or '.join(MOMENTUM)}, not {args.optim.value}")

    def memory(self, selection: Selection) -> int:
        return 4 * selection.num_trained
