"""Which elements of a parameter are meant: boolean masks, packed eight to a byte, in memory or in a folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hft.errors import HFTError, reason

MASKS_NAME = "hft_masks.safetensors"


class Mask:
    """A boolean tensor at one bit per element: 0.8 GB for every matrix of a 7B model.

    `bits` are uint8, the first element in the lowest bit, or a function that makes them, called when they are first
    asked for. The shape broadcasts to the parameter's: (1, in) is a mask of input columns. `count` elements are True,
    where that is known without the bits.
    """

    def __init__(
        self, bits: torch.Tensor | Callable[[], torch.Tensor], shape: tuple[int, ...], count: int | None = None
    ) -> None:
        self._bits, self.shape, self._count = bits, shape, count

    @classmethod
    def of(cls, mask: torch.Tensor) -> Mask:
        return cls(_packed(mask), tuple(mask.shape))

    @property
    def bits(self) -> torch.Tensor:
        if callable(self._bits):
            self._bits = self._bits()
        return self._bits

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def tensor(self) -> torch.Tensor:
        """Unpack it, on the device that it lies on."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        flat = (self.bits[:, None] >> shifts) & 1
        return flat.reshape(-1)[: self.numel].view(self.shape).view(torch.bool)

    def __invert__(self) -> Mask:
        count = None if self._count is None else self.numel - self._count
        return Mask(lambda: _packed(~self.tensor()), self.shape, count)

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.bits | other.bits, self.shape)

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.bits & other.bits, self.shape)

    def count(self) -> int:
        if self._count is None:
            self._count = int.from_bytes(self.bits.cpu().numpy(), "little").bit_count()
        return self._count

    def to(self, device: torch.device) -> Mask:
        return Mask(self.bits.to(device), self.shape)

    def digest(self) -> str:
        return hashlib.sha256(str(self.shape).encode() + self.bits.cpu().numpy().tobytes()).hexdigest()


def _packed(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little")).to(mask.device)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` largest scores; of equal ones those with the lowest flat index.

    `torch.topk` leaves open which of equal scores it takes, and sorts what need not be sorted.
    """
    flat = scores.reshape(-1)
    if count <= 0 or count >= flat.numel():
        return torch.full(scores.shape, count > 0, device=scores.device)
    least = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > least
    ties = (flat == least).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


def broadcasts(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a mask's shape broadcasts to a parameter's: each dimension is as long, or 1."""
    return len(mask) == len(shape) and all(m in (1, s) for m, s in zip(mask, shape, strict=True))


def save_masks(folder: str | Path, masks: Mapping[str, Mask]) -> None:
    """Write masks by parameter name into `hft_masks.safetensors`; without masks no file is written."""
    path = Path(folder) / MASKS_NAME
    path.unlink(missing_ok=True)
    if masks:
        metadata = {name: json.dumps(list(mask.shape)) for name, mask in masks.items()}
        save_file({name: mask.bits.cpu() for name, mask in masks.items()}, path, metadata=metadata)


class Masks(Mapping):
    """The masks of a folder by parameter name; the bits of each are read from disk when they are asked for."""

    def __init__(self, folder: str | Path):
        path = Path(folder) / MASKS_NAME
        if not path.exists():
            raise HFTError(f"{path} is missing: it marks the elements that train or are frozen")
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise HFTError(f"{path} is not a complete file of masks: {reason(error)}") from error
        self.shapes = {name: tuple(json.loads(shape)) for name, shape in (self._file.metadata() or {}).items()}

    def __getitem__(self, name: str) -> Mask:
        return Mask(functools.partial(self._file.get_tensor, name), self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def frozen_values(tensor: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """What of a parameter is frozen: all of it, in its shape; with a mask flat, and all that a base of slices holds."""
    if mask is None:
        return tensor
    return tensor[mask.tensor().expand(tensor.shape)] if broadcasts(mask.shape, tensor.shape) else tensor.flatten()
