"""Makes a model obey a selection, and proves that it did."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from hft.anatomy import some
from hft.errors import HFTError
from hft.selection.policies import Selection
from hft.weights import Weights, as_bytes, checksum

HALF_PRECISION = (torch.float16, torch.bfloat16)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Set `requires_grad` of every parameter by name. To be called before the optimizer is built.

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
    """

    against: str
    identical: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.broken or self.lost)

    def report(self) -> str:
        """The result in words, a line a finding."""
        frozen, trained = len(self.identical) + len(self.broken), len(self.changed) + len(self.unchanged)
        lines = [
            f"frozen:  {len(self.identical)} of {frozen} tensors bit-identical to {self.against}",
            f"trained: {len(self.changed)} of {trained} tensors changed"
            if trained
            else "trained: not compared, the base is not at hand",
        ]
        if self.unchanged:
            lines.append(f"  bit-identical to the base though trained: {some(self.unchanged, most=3)}")
        if self.unchanged and not self.changed:
            lines.append("  WARNING: nothing has moved; is the learning rate too low for the dtype?")
        lines += [f"  MISMATCH {name}: {reason}" for name, reason in list(self.broken.items())[:10]]
        lines += [f"  MISSING {name}" for name in self.lost[:10]]
        wrong = len(self.broken) + len(self.lost)
        lines.append("verify passed" if self.ok else f"verify FAILED: {wrong} tensors differ or are missing")
        return "\n".join(lines)


def verify(out: Weights, frozen: Mapping[str, str], trained: Iterable[str], base: Weights | None) -> Verification:
    """Compare a fine-tuned checkpoint with its base, tensor by tensor.

    Args:
        out: the fine-tuned checkpoint.
        frozen: checksum of each frozen tensor, as the manifest holds it.
        trained: names of the trained tensors, as the manifest holds them.
        base: the checkpoint it started from; without it the frozen tensors are held against the checksums alone.
    """
    paths = (str(base.folder), os.path.relpath(base.folder)) if base is not None else ("the manifest's checksums",)
    result = Verification(against=min(paths, key=len))
    for name in tqdm([*frozen, *trained], desc="verifying", unit="tensor", leave=False):
        if name not in frozen:
            if name not in out:
                result.lost.append(name)
            elif base is not None and name in base:
                (result.unchanged if _same(out[name], base[name]) else result.changed).append(name)
        elif name not in out:
            result.broken[name] = "missing from the checkpoint"
        elif base is not None and name not in base:
            result.broken[name] = "missing from the base"
        elif base is not None and not _same(out[name], base[name]):
            result.broken[name] = _difference(out[name], base[name])
        elif base is None and checksum(out[name]) != frozen[name]:
            result.broken[name] = "its checksum is not the manifest's"
        else:
            result.identical.append(name)
    return result


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)}, in the base {b.dtype} {tuple(b.shape)}"
    count = int((as_bytes(a) != as_bytes(b)).sum())
    return f"{count} of {as_bytes(a).numel()} bytes differ, by at most {(a.double() - b.double()).abs().max():.3g}"
