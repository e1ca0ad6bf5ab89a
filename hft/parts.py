"""Parameters that train in part: the base's values stay as they are, and only the trained elements are a parameter."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from hft.selection.masks import Mask

BASE, TRAINED = "original0", "original1"  # torch's names for the tensors that a parametrization is made from


class TrainsInPart(nn.Module):
    """The parametrization of a weight whose elements partly train.

    The weight is put together at each use from the base's values, which no step touches, and the trained elements,
    which are the only ones with an fp32 master, a gradient and optimizer state. It has the dtype of the base's values.

    A mask that varies along neighboring dimensions only, such as slices of stacked experts, rows or columns, selects
    along these; any other selects single elements. The base has the frozen slices alone, unless a reference shares it;
    beside columns and single elements, which take longer to put together, it is whole.
    """

    def __init__(self, frozen: Mask, shape: torch.Size) -> None:
        super().__init__()
        self.shape, (along, self.folded, self.by_element) = shape, _layout(frozen, shape)
        if self.by_element:
            self.compact = (-1, 1)  # a column, so that it still counts as a matrix
            self.register_buffer("bits", Mask.of(~frozen.tensor().expand(shape)).bits, persistent=False)
        else:
            # FSDP2 divides the first dimension: rows, since 4 experts would leave 4 of 8 processes without any.
            self.compact = (*shape[: along.start], -1, *shape[along.stop :][-1:])
            trained = ~frozen.tensor().view(frozen.shape[along]).expand(shape[along]).reshape(-1)
            self.register_buffer("index", trained.nonzero().squeeze(1), persistent=False)
            if self.folded[2] > 1:
                self.register_buffer("rest", (~trained).nonzero().squeeze(1), persistent=False)

    def forward(self, base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        """The weight."""
        return _PutTogether.apply(base, trained, self)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keep(weight) if self.folded[2] > 1 else weight, self.take(weight)

    def put(self, base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        """A new tensor of the weight's shape, from the base as it is held or whole and the trained elements."""
        if self.by_element:
            return base.masked_scatter(Mask(self.bits, self.shape).tensor(), trained)
        is_whole = base.shape == self.shape
        base, trained = (tensor.reshape(self.folded[0], -1, self.folded[2]) for tensor in (base, trained))
        weight = base.clone() if is_whole else base.new_empty(self.folded).index_copy_(1, self.rest, base)
        return weight.index_copy_(1, self.index, trained).view(self.shape)

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """The trained elements of a tensor of the weight's shape."""
        if self.by_element:
            return weight[Mask(self.bits, self.shape).tensor()].view(self.compact)
        return weight.reshape(self.folded).index_select(1, self.index).reshape(self.compact)

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """The frozen slices of a tensor of the weight's shape."""
        return weight.reshape(self.folded).index_select(1, self.rest).reshape(self.compact)


class _PutTogether(torch.autograd.Function):
    """Keeps nothing for the backward pass, where autograd would keep a mask of a byte per element."""

    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, trained: torch.Tensor, part: TrainsInPart) -> torch.Tensor:
        ctx.part, ctx.dtype = part, trained.dtype
        return part.put(base, trained.to(base.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, ctx.part.take(gradient).to(ctx.dtype), None


def _layout(frozen: Mask, shape: torch.Size) -> tuple[slice, tuple[int, int, int], bool]:
    """The dimensions that a mask varies along, the weight folded around them, and whether it selects elements."""
    varying = [dim for dim, size in enumerate(frozen.shape) if size > 1] or range(len(shape))
    along = slice(varying[0], varying[-1] + 1)
    folded = (math.prod(shape[: along.start]), math.prod(shape[along]), math.prod(shape[along.stop :]))
    return along, folded, folded[0] == folded[2] == 1 and len(shape) > 1


def index_bytes(frozen: Mask, shape: torch.Size) -> tuple[int, bool]:
    """Bytes of what says which elements train, and whether the base is whole where no reference shares it."""
    _, (_, along, inner), by_element = _layout(frozen, shape)
    held = along - frozen.count() * along // frozen.numel if inner == 1 else along
    return -(-along // 8) if by_element else 8 * held, inner == 1


def split(model: nn.Module, masks: Mapping[str, Mask], *, whole_states: bool = True) -> None:
    """Let the parameters with a mask of frozen elements train in part.

    State dicts keep the names and shapes of the checkpoint, with the trained elements in their own dtype, unless FSDP2
    shards base and trained elements: then `joined` puts them together. `whole_states` false leaves that to it from the
    start, since accelerate makes state dicts too.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for tensor, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, tensor))
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        weight, part = parameters[name], None
        for module, tensor in owners[weight]:
            if whole_states and not parts_of(module, recurse=False):
                module.register_state_dict_post_hook(_join)
                module.register_load_state_dict_pre_hook(_take_apart)
            in_part = TrainsInPart(mask.to(weight.device), weight.shape) if part is None else part[0]
            parametrize.register_parametrization(module, tensor, in_part)
            if part is None:
                part = module.parametrizations[tensor]
                part.original0.requires_grad_(False)
                part.original1.requires_grad_(True)
            module.parametrizations[tensor] = part  # one of all modules that are tied


def _join(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    """A state dict with whole weights."""
    for tensor, part in parts_of(module, recurse=False).items():
        keys = [f"{prefix}parametrizations.{tensor}.{name}" for name in (BASE, TRAINED)]
        if keys[0] in state and not isinstance(state[keys[0]], DTensor):
            state[prefix + tensor] = weight_of(part, *map(state.pop, keys))


def _take_apart(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *others: Any) -> None:
    """Take a state dict's weights apart; the base keeps its values of what trains, and all if only that was saved."""
    for tensor, part in parts_of(module, recurse=False).items():
        if prefix + tensor in state:
            key, base, made = f"{prefix}parametrizations.{tensor}.", part.original0, part[0]
            weight = state.pop(prefix + tensor).to(base.device)
            if weight.shape == made.shape:
                values, weight = weight.to(base.dtype), made.take(weight)
                base = made.put(values, made.take(base)) if base.shape == made.shape else made.keep(values)
            state[key + BASE], state[key + TRAINED] = base, weight.view(made.compact)


def joined(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A full state dict that FSDP2 has gathered, with whole weights."""
    state = dict(state)
    for name, module in model.named_modules():
        _join(module, state, f"{name}." if name else "", None)
    return state


def join(model: nn.Module) -> None:
    """Make whole parameters of those that train in part, in the dtype of their trained elements."""
    for part in parts_of(model).values():
        part.original0.data = part.original0.data.to(part.original1.dtype)
    for module in model.modules():
        for tensor in parts_of(module, recurse=False):
            parametrize.remove_parametrizations(module, tensor)


def weight_of(part: parametrize.ParametrizationList, base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """The weight in the dtype of its trained elements; computing uses that of the base."""
    return part[0](base.to(trained.dtype), trained)


def parts_of(model: nn.Module, *, recurse: bool = True) -> dict[str, parametrize.ParametrizationList]:
    """The parameters that train in part, by the name that the checkpoint has for them."""
    return {
        f"{owner}.{tensor}".removeprefix("."): part
        for owner, module in (model.named_modules() if recurse else [("", model)])
        if parametrize.is_parametrized(module)
        for tensor, part in module.parametrizations.items()
        if isinstance(part[0], TrainsInPart)
    }


def checkpoint_name(name: str) -> str:
    """The name that the checkpoint has for a parameter, or for the base or the trained elements of one."""
    return re.sub(r"parametrizations\.([^.]+)\.original[01]$", r"\1", name)


def is_part(name: str, which: str) -> bool:
    """Whether a parameter is `BASE` or `TRAINED` of one that trains in part."""
    return checkpoint_name(name) != name and name.endswith(which)


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the checkpoint's names; of those that train in part the base's values."""
    return {checkpoint_name(name): p for name, p in model.named_parameters() if not is_part(name, TRAINED)}
