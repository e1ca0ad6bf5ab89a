"""Mixout (arXiv 1909.11299; paper Table 5): random input columns go back to the base in each forward pass.

Of each trained linear layer of the decoder, in training. The base is this run's: 13.0 GB for Llama-2-7B in bf16.
"""

import functools
from dataclasses import MISSING, dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from hft.config import option
from hft.errors import HFTError
from hft.methods.update import Update, copies
from hft.model.anatomy import Anatomy
from hft.parts import parts_of, weight_of
from hft.selection import Selection
from hft.selection.importance import matrices_of


@dataclass
class Mixout(Update):
    name: ClassVar[str] = "mixout"
    acts_around_step: ClassVar[bool] = False
    replicated: ClassVar[bool] = True  # FSDP2 gathers a layer's weights for its forward pass, not ours

    mixout_p: Annotated[float, Field(gt=0, lt=1)] = option("Probability that an input column is the base's.", MISSING)

    def callbacks(self, model: nn.Module, anatomy: Anatomy) -> list[TrainerCallback]:
        matrices = matrices_of(model, anatomy).keys()
        in_part = {n: part.original1.detach().clone() for n, part in parts_of(model).items() if n in matrices}
        return [MixColumns(copies(model, matrices) | in_part, self.mixout_p)]

    def check(self, model: nn.Module, selection: Selection) -> None:
        matrices_of(model, selection.anatomy)

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if (args.activation_checkpointing_kwargs or {}).get("preserve_rng_state") is False:
            raise HFTError("mixout must draw the same columns when a layer is recomputed; drop preserve_rng_state")

    def memory(self, selection: Selection) -> int:
        return 2 * selection.num_trained_in_layers


class MixColumns(TrainerCallback):
    """Replaces the forward of the mixed linear layers while a run trains; evaluation uses the weights as they are.

    Processes draw different columns, as for dropout. Autograd keeps the mixed matrices: another copy of the weights in
    the dtype of matmuls, or of one layer's under activation checkpointing.
    """

    def __init__(self, start: dict[str, torch.Tensor], p: float):
        self.start, self.p = start, p

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, start in self.start.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            module.forward = functools.partial(mixed_forward, module, start.to(model.device), self.p)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for name in self.start:
            del model.get_submodule(name.removesuffix(".weight")).forward


def mixed_forward(module: nn.Linear, start: torch.Tensor, p: float, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    if module.training:
        part = parts_of(module, recurse=False).get("weight")
        if part:
            weight, start = (weight_of(part, part.original0, trained) for trained in (part.original1, start))
        weight = mix(weight, start, p, kept=torch.rand(weight.shape[1], device=weight.device) >= p)
    return functional.linear(x, weight, module.bias)


def mix(weight: torch.Tensor, start: torch.Tensor, p: float, kept: torch.Tensor) -> torch.Tensor:
    """Mixout's weight, [(1-m) W0 + m W - p W0] / (1-p), which is W0 + m (W - W0) / (1-p) and on average W.

    W and W0 are (out, in), W0 in any dtype; m is (in,), the input columns that stay W. The gradient is m / (1-p); the
    official code drops the constant 1 / (1-p), on which AdamW's step depends only through epsilon and clipping.
    """
    start = start.to(weight.dtype)
    return start + (weight - start) * (kept / (1 - p)).to(weight.dtype)
