"""Makes a model obey a selection, and proves that it did."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from hft.errors import HFTError
from hft.model.anatomy import shorten
from hft.model.weights import as_bytes, checksum
from hft.selection.masks import Mask
from hft.selection.policies import Selection

HALF_PRECISION = (torch.float16, torch.bfloat16)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Set `requires_grad` of every parameter by name. To be called before the optimizer is built.

    Partly frozen parameters require a gradient; `PartFreezer` keeps their frozen scalars in place.

    Raises:
        HFTError: the model lacks a parameter of the selection, so it is not the model that was selected for.
    """
    frozen = set(selection.frozen_parameters)
    parameters = dict(model.named_parameters())
    if missing := frozen - parameters.keys():
        raise HFTError(f"the selection freezes {sorted(missing)[0]}, which the model does not have")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)


def upcast(model: nn.Module, *, autocast: bool) -> None:
    """Give trained parameters fp32 masters; AdamW on half-precision weights rounds most updates at 2e-5 away.

    Frozen parameters keep the checkpoint's dtype under autocast, which casts them at each use. Without autocast every
    matmul needs one dtype, so they are held in fp32 too; the way back to the checkpoint's dtype is exact.
    """
    for parameter in model.parameters():
        if parameter.dtype in HALF_PRECISION and (parameter.requires_grad or not autocast):
            parameter.data = parameter.data.float()


class PartFreezer:
    """Keeps the frozen scalars of partly frozen parameters as they are, whatever the optimizer does.

    Their gradient is set to zero as soon as it is accumulated, so that clipping and the optimizer's moments never see
    it, and their values are put back after each step, since weight decay and warm moments move a scalar whose gradient
    is zero. (The hook is `register_post_accumulate_grad_hook`: a plain tensor hook never fires on what FSDP2 shards.)

    To be made once the model is on its device and sharded. Beside the model it holds the masks, a bit for each scalar
    at most, and the frozen values.

    Args:
        model: the model that trains.
        masks: of each partly frozen parameter, which scalars are frozen.
        dtypes: dtypes that hold the frozen values exactly, by name; elsewhere they are held in the parameter's.
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
        """Put the frozen values back. To be called after each step of the optimizer."""
        for parameter, mask, values in self._held:
            local = _local(parameter)
            local.masked_scatter_(mask.tensor(), values.to(local.dtype))

    def remove(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self._held, self._hooks = [], []


def _zero_grad(mask: Mask, parameter: nn.Parameter) -> None:
    _local(parameter.grad).masked_fill_(mask.tensor(), 0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that FSDP2 shards; any other tensor itself. Both share their storage."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _shard(mask: Mask, parameter: torch.Tensor) -> Mask:
    if not isinstance(parameter, DTensor):
        return mask
    whole = mask.tensor().expand(parameter.shape).contiguous().to(parameter.device)
    return Mask.of(distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local())


@dataclass
class Verification:
    """What `verify` found; each list holds tensor names.

    Attributes:
        identical: frozen and bit-identical to the base.
        broken: frozen, yet different from the base, or missing, with the reason.
        lost: trained, and missing from the checkpoint.
        changed: trained and different from the base.
        unchanged: trained, yet bit-identical to the base: nothing wrong, but worth a look.
        against: what the frozen tensors were compared with.
        parts: those among `identical` that are frozen in part and were compared there.
    """

    against: str
    identical: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.broken or self.lost)

    def count(self, part: str = "part") -> str:
        """How many of the frozen tensors are identical, in words."""
        parts = f", {len(self.parts)} of them {part} of a tensor" if self.parts else ""
        total = len(self.identical) + len(self.broken)
        return f"{len(self.identical)} of {total} tensors bit-identical to {self.against}{parts}"

    def differences(self) -> list[str]:
        """A line for each of the first tensors that should not differ."""
        broken = [f"  MISMATCH {name}: {reason}" for name, reason in list(self.broken.items())[:10]]
        return broken + [f"  MISSING {name}" for name in self.lost[:10]]

    def report(self) -> str:
        """The result in words, a line a finding."""
        trained = len(self.changed) + len(self.unchanged)
        lines = [
            "frozen:  " + self.count("the frozen part"),
            f"trained: {len(self.changed)} of {trained} tensors changed"
            if trained
            else "trained: not compared, the base is not at hand",
        ]
        if self.unchanged:
            lines.append(f"  bit-identical to the base though trained: {shorten(self.unchanged, most=3)}")
        if self.unchanged and not self.changed:
            lines.append("  WARNING: nothing has moved; is the learning rate too low for the dtype?")
        lines += self.differences()
        wrong = len(self.broken) + len(self.lost)
        lines.append("verify passed" if self.ok else f"verify FAILED: {wrong} tensors differ or are missing")
        return "\n".join(lines)


@dataclass
class ResetVerification:
    """What `verify` found of a Half-Reset, in which nothing has trained.

    Attributes:
        back: what went back to the base, held against it.
        kept: what stayed, held against the tuned model; None where that is not at hand.
        tuned: the tuned model in words.
    """

    back: Verification
    kept: Verification | None
    tuned: str

    @property
    def ok(self) -> bool:
        return self.back.ok and (self.kept is None or self.kept.ok)

    def report(self) -> str:
        """The result in words, a line a finding."""
        lines = ["reset: " + self.back.count()]
        lines += [f"tuned: {self.kept.count()}" if self.kept else f"tuned: not compared, {self.tuned} is not at hand"]
        halves = [self.back, *([self.kept] if self.kept else [])]
        lines += [line for half in halves for line in half.differences()]
        wrong = sum(len(half.broken) + len(half.lost) for half in halves)
        lines.append("verify passed" if self.ok else f"verify FAILED: {wrong} tensors differ or are missing")
        return "\n".join(lines)


def verify(
    out: Mapping[str, torch.Tensor],
    frozen: Mapping[str, str],
    trained: Iterable[str],
    base: Mapping[str, torch.Tensor] | None,
    *,
    masks: Mapping[str, Mask] | None = None,
    against: str = "the base",
) -> Verification:
    """Compare a fine-tuned checkpoint with its base, tensor by tensor.

    Args:
        out: the fine-tuned checkpoint.
        frozen: checksum of each wholly or partly frozen tensor, as the manifest holds it; empty where it holds none,
            and only the base is there to compare with.
        trained: names of the tensors that train wholly or in part, as the manifest holds them.
        base: the checkpoint it started from; without it the frozen tensors are held against the checksums alone.
        masks: of each partly frozen tensor, which scalars are frozen.
        against: the base in words.
    """
    masks = masks or {}
    result = Verification(against=against if base is not None else "the manifest's checksums")

    def frozen_values(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        values = weights[name]
        return values[masks[name].tensor().expand(values.shape)] if name in masks else values

    for name in tqdm(frozen, desc="verifying what is frozen", unit="tensor", leave=False):
        if name not in out:
            result.broken[name] = "missing from the checkpoint"
        elif base is not None and name not in base:
            result.broken[name] = "missing from the base"
        elif base is not None and frozen[name] and checksum(frozen_values(base, name)) != frozen[name]:
            result.broken[name] = "the base has another one than the manifest was written for"
        elif base is not None and not _same(ours := frozen_values(out, name), theirs := frozen_values(base, name)):
            result.broken[name] = _difference(ours, theirs)
        elif base is None and checksum(frozen_values(out, name)) != frozen[name]:
            result.broken[name] = "its checksum is not the manifest's"
        else:
            result.identical.append(name)
            result.parts += [name] if name in masks else []
    for name in tqdm(trained, desc="verifying what trained", unit="tensor", leave=False):
        if name not in out:
            result.lost.append(name)
        elif base is not None and name in base:
            (result.unchanged if _same(out[name], base[name]) else result.changed).append(name)
    return result


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)}, in the base {b.dtype} {tuple(b.shape)}"
    count = int((as_bytes(a) != as_bytes(b)).sum())
    return f"{count} of {as_bytes(a).numel()} bytes differ, by at most {(a.double() - b.double()).abs().max():.3g}"
