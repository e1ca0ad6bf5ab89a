"""What is saved of a model: in which dtypes, and under which keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from hft.parts import checkpoint_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cast(
    state: dict[str, torch.Tensor], model: PreTrainedModel, dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """A state dict whose parameters have the dtypes given by name; tied ones stay one tensor under several keys."""
    names = {id(parameter): checkpoint_name(name) for name, parameter in model.named_parameters()}
    keys = {checkpoint_name(key): names[id(p)] for key, p in model.named_parameters(remove_duplicate=False)}
    made: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = keys.get(key, key)
        if name not in made:
            wanted = dtypes.get(name, tensor.dtype)
            made[name] = tensor if tensor.dtype == wanted else tensor.to(wanted).cpu()
    return {key: made[keys.get(key, key)] for key in state}


def state_keys(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The keys of some parameters in a model's state dict, where tied ones have one each."""
    parameters = dict(model.named_parameters())
    meant = {id(parameters[name]) for name in names}
    return {key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in meant}
