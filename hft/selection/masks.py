"""Which elements of a partly frozen parameter are frozen: boolean masks, packed eight to a byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hft.errors import HFTError, reason

MASKS_NAME = "hft_masks.safetensors"
# How many bits are set in each byte.
BITS_SET = torch.tensor([byte.bit_count() for byte in range(256)])


@dataclass(frozen=True, eq=False)
class Mask:
    """A boolean tensor at one bit per element: 0.8 GB for every matrix of a 7B model.

    Attributes:
        bits: uint8 of shape (elements / 8, rounded up), the first element in the lowest bit.
        shape: of the mask, which broadcasts to its parameter: (1, in) is a mask of input columns.
    """

    bits: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: torch.Tensor) -> Mask:
        """Pack a boolean tensor."""
        flat = mask.reshape(-1).to(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
        return cls((flat * weights).sum(-1, dtype=torch.uint8), tuple(mask.shape))

    def tensor(self) -> torch.Tensor:
        """Unpack it, on the device that it lies on."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        flat = (self.bits[:, None] >> shifts) & 1
        return flat.reshape(-1)[: torch.Size(self.shape).numel()].view(self.shape).bool()

    def __invert__(self) -> Mask:
        return Mask.of(~self.tensor())

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.bits | other.bits, self.shape)

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.bits & other.bits, self.shape)

    def count(self) -> int:
        """How many of its elements are True."""
        return int(torch.bincount(self.bits.cpu(), minlength=256) @ BITS_SET)

    def to(self, device: torch.device) -> Mask:
        return Mask(self.bits.to(device), self.shape)

    def digest(self) -> str:
        """SHA-256 of shape and bits."""
        return hashlib.sha256(str(self.shape).encode() + self.bits.cpu().numpy().tobytes()).hexdigest()


def save_masks(folder: str | Path, masks: Mapping[str, Mask]) -> None:
    """Write masks by parameter name into `hft_masks.safetensors`; without masks no file is written."""
    path = Path(folder) / MASKS_NAME
    path.unlink(missing_ok=True)
    if masks:
        metadata = metadata_of({name: mask.shape for name, mask in masks.items()})
        save_file({name: mask.bits.cpu() for name, mask in masks.items()}, path, metadata=metadata)


def metadata_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a file of masks holds of their shapes."""
    return {name: json.dumps(list(shape)) for name, shape in shapes.items()}


class Masks(Mapping):
    """The masks of a folder by parameter name, each read from disk when it is asked for.

    Raises:
        HFTError: the file is missing, or is not one of masks.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / MASKS_NAME
        if not path.exists():
            raise HFTError(f"{path} is missing: it says which elements of the tensors are meant")
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise HFTError(f"{path} is not a complete file of masks: {reason(error)}") from error
        self.shapes = {name: tuple(json.loads(shape)) for name, shape in (self._file.metadata() or {}).items()}

    def __getitem__(self, name: str) -> Mask:
        return Mask(self._file.get_tensor(name), self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def load_masks(folder: str | Path) -> dict[str, Mask]:
    """Read all that `save_masks` wrote (`Masks`)."""
    return dict(Masks(folder))


def frozen_values(tensor: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """What of a parameter is frozen: the elements under its mask, flat; all of it, in its shape, without a mask."""
    return tensor if mask is None else tensor[mask.tensor().expand(tensor.shape)]
