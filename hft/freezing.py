"""Makes a model obey a selection."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hft.errors import HFTError
from hft.parts import BASE, is_part, parts_of, stored
from hft.selection import Selection

HALF_PRECISION = (torch.float16, torch.bfloat16)
STACKED = 3  # dimensions of the weights of stacked experts


def freeze(model: nn.Module, selection: Selection) -> None:
    """Set `requires_grad` of every parameter by name, and clear gradients: an optimizer looks at them alone.

    Parameters that train in part require a gradient; `hft.parts.split` leaves it to their trained elements.
    """
    check_parameters(model, selection)
    frozen = set(selection.frozen_parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in frozen or name in selection.frozen_masks:
            parameter.grad = None


def autocast_experts(model: nn.Module) -> None:
    """Let stacked experts that train whole compute in half precision: autocast does not cast `grouped_mm`."""
    for module in model.modules():
        trained = any(p.ndim == STACKED and p.requires_grad for p in module.parameters(recurse=False))
        if trained and not isinstance(module, _NarrowExperts):
            module.__class__ = type(type(module).__name__, (_NarrowExperts, type(module)), {})


class _NarrowExperts(nn.Module):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, nn.Parameter) and value.ndim == STACKED and torch.is_autocast_enabled(value.device.type):
            return value.to(torch.get_autocast_dtype(value.device.type))
        return value


def check_parameters(model: nn.Module, selection: Selection) -> None:
    """Refuse a model whose parameters are not those that the selection freezes or trains."""
    listed, names = {*selection.frozen_parameters, *selection.trained_parameters}, stored(model).keys()
    if missing := sorted(listed - names):
        raise HFTError(f"the selection names {missing[0]}, which the model does not have")
    if unlisted := sorted(names - listed):
        why = "the weights have it as a separate parameter and the config does not"
        remedy = "correct the config (a head that differs from the embeddings needs tie_word_embeddings: false)"
        raise HFTError(f"{unlisted[0]} would be neither frozen nor trained: {why}; {remedy}")


def check_frozen(model: nn.Module, selection: Selection) -> None:
    """Check that exactly the trained parameters require a gradient."""
    check_parameters(model, selection)
    frozen = set(selection.frozen_parameters)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == (name in frozen or is_part(name, BASE)):
            what = f"{name} should be {'frozen' if name in frozen else 'trained'} and is not"
            raise HFTError(f"{what}; did something change requires_grad after the trainer was made?")


def upcast(model: nn.Module, *, autocast: bool) -> None:
    """Give trained parameters fp32 master weights; AdamW on half-precision weights rounds most updates at 2e-5 away.

    Frozen ones keep their dtype under autocast, except embeddings, whose dtype is that of the residual stream, and
    LayerNorms, which on a CPU take no other than their input's. Without autocast every matmul needs one dtype.
    """
    kinds = (nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    wide = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    parts, head = parts_of(model).items(), getattr(model, "get_output_embeddings", lambda: None)()
    wide |= {id(part.original0) for name, part in parts if is_wide(name, part.original0.ndim)}
    wide |= {id(part.original0) for part in parts_of(head).values()} if head else set()  # TRL sums its gradient
    for parameter in model.parameters():
        held_wide = parameter.requires_grad or not autocast or id(parameter) in wide
        if parameter.dtype in HALF_PRECISION and held_wide:
            parameter.data = parameter.data.float()


def is_wide(name: str, ndim: int) -> bool:
    """Whether a parameter is a norm or a bias, which take part in fp32 sums, not in matrix products."""
    return ndim == 1 or name.endswith("bias")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 shards, gathered from all processes; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has whole, on a parameter's device and sharded as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
