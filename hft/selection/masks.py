"""Which elements of a partly frozen parameter are frozen: boolean masks, packed eight to a byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hft.errors import HFTError

MASKS_NAME = "hft_masks.safetensors"


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
        shapes = {name: json.dumps(mask.shape) for name, mask in masks.items()}
        save_file({name: mask.bits.cpu() for name, mask in masks.items()}, path, metadata=shapes)


def load_masks(folder: str | Path) -> dict[str, Mask]:
    """Read what `save_masks` wrote.

    Raises:
        HFTError: the file is missing.
    """
    path = Path(folder) / MASKS_NAME
    if not path.exists():
        raise HFTError(f"{path} is missing: it says which parts of the tensors were frozen")
    with safe_open(path, framework="pt") as file:
        shapes = file.metadata()
        return {name: Mask(file.get_tensor(name), tuple(json.loads(shapes[name]))) for name in shapes}


def frozen_values(tensor: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """What of a parameter is frozen: the elements under its mask, flat; all of it, in its shape, without a mask."""
    return tensor if mask is None else tensor[mask.tensor().expand(tensor.shape)]
