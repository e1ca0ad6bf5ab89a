"""Makes a model obey a selection."""

import functools
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hft.errors import HFTError
from hft.selection import Selection
from hft.selection.masks import Mask

HALF_PRECISION = (torch.float16, torch.bfloat16)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Set `requires_grad` of every parameter by name. Call it before the optimizer is built.

    Partly frozen parameters require a gradient; `PartFreezer` keeps their frozen elements in place. A gradient from
    before would still move what is frozen now: optimizers look at it alone.
    """
    check_parameters(model, selection)
    frozen = set(selection.frozen_parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in frozen or name in selection.frozen_masks:
            parameter.grad = None


def check_parameters(model: nn.Module, selection: Selection) -> None:
    """Refuse a model unless each of its parameters is in exactly one of frozen and trained."""
    frozen, trained = selection.frozen_parameters, selection.trained_parameters
    listed, names = Counter([*frozen, *trained]), {name for name, _ in model.named_parameters()}
    if missing := sorted(listed.keys() - names):
        raise HFTError(f"the selection names {missing[0]}, which the model does not have")
    if unlisted := sorted(names - listed.keys()):
        raise HFTError(
            f"{unlisted[0]} would be neither frozen nor trained: the weights have it as a separate parameter and the "
            "config does not; correct the config (a head that differs from the embeddings needs tie_word_embeddings: "
            "false)"
        )
    if twice := [name for name, count in listed.items() if count > 1]:
        raise HFTError(f"the selection names {twice[0]} both as frozen and as trained")


def check_frozen(model: nn.Module, selection: Selection) -> None:
    """Check that exactly the trained parameters require a gradient."""
    check_parameters(model, selection)
    frozen = set(selection.frozen_parameters)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == (name in frozen):
            raise HFTError(
                f"{name} should be {'frozen' if name in frozen else 'trained'} and is not; did something "
                "change requires_grad after the trainer was made?"
            )


def upcast(model: nn.Module, *, autocast: bool) -> None:
    """Give trained parameters fp32 master weights; AdamW on half-precision weights rounds most updates at 2e-5 away.

    Frozen parameters keep the checkpoint's dtype under autocast, which casts them at each use, except embeddings, whose
    dtype is that of the residual stream, which is to be fp32 whatever trains, and LayerNorms, which on a CPU take no
    other than their input's. Without autocast every matmul needs one dtype, so all of them are held in fp32; the way
    back to the checkpoint's dtype is exact.
    """
    kinds = (nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    streams = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    for parameter in model.parameters():
        wide = parameter.requires_grad or not autocast or id(parameter) in streams
        if parameter.dtype in HALF_PRECISION and wide:
            parameter.data = parameter.data.float()


class PartFreezer:
    """Keeps the frozen elements of partly frozen parameters as they are, whatever the optimizer does.

    Their gradient is set to zero as soon as it is accumulated, so that clipping and the optimizer's moments never see
    it. Their values are put back after each step, since weight decay and warm moments move elements without a gradient
    too. (The hook is `register_post_accumulate_grad_hook`: a plain tensor hook never fires on what FSDP2 shards.)

    Make it once the model is on its device and sharded. It holds the masks, at most a bit per element, and the frozen
    values, in the dtypes given by name, which must hold them exactly, or else in the parameter's.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Mask], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        self._held: list[tuple[nn.Parameter, Mask, torch.Tensor]] = []
        self._hooks = []
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            parameter = parameters[name]
            local = _local(parameter)
            frozen = _shard(mask, parameter).to(local.device)
            values = local[frozen.tensor().expand(local.shape)].to((dtypes or {}).get(name, local.dtype))
            self._held.append((parameter, frozen, values))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(functools.partial(_zero_grad, frozen)))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the frozen values back. Call it after each step of the optimizer."""
        for parameter, mask, values in self._held:
            local = _local(parameter)
            local.masked_scatter_(mask.tensor(), values.to(local.dtype))

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._held, self._hooks = [], []


def _zero_grad(mask: Mask, parameter: nn.Parameter) -> None:
    _local(parameter.grad).masked_fill_(mask.tensor(), 0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 shards, gathered from all processes; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that FSDP2 shards; any other tensor itself. Both share their storage."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has whole, on a parameter's device and sharded as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def _shard(mask: Mask, parameter: torch.Tensor) -> Mask:
    if not isinstance(parameter, DTensor):
        return mask
    return Mask.of(_local(sharded_like(mask.tensor().expand(parameter.shape).contiguous(), parameter)))
