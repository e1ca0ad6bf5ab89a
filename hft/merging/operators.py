"""How tensors are merged: pure functions on pieces of tensors, in fp32 or better.

Deltas are what a fine-tuned model has beyond its base (its task vector), all of one flat shape. Where peft has the
operator, it is peft's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, task_arithmetic

# Two tensors whose directions are closer than this are interpolated on the line: mergekit's rule.
LINE = 0.9995


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of tensors times weights."""
    return task_arithmetic(list(tensors), torch.tensor(weights, dtype=tensors[0].dtype))


def drop(delta: torch.Tensor, p: float, key: str) -> torch.Tensor:
    """DARE: set each scalar to zero with probability p and divide the others by 1 - p (Yu et al. 2023).

    peft's `random_pruning` with a generator of its own, so that the mask hangs on the key alone.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return delta * torch.bernoulli(torch.full_like(delta, 1 - p), generator=generator) / (1 - p)


def elect(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """TIES: the sign of the sum wins; the mean of those deltas that have it and are not zero (Yadav et al. 2023).

    A sum of zero counts as positive, as in peft and mergekit.
    """
    stacked = torch.stack(list(deltas))
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


class Trim:
    """TIES: keeps the given share of a sequence of deltas that is largest in magnitude, and sets the rest to zero.

    The share is taken over the whole sequence and is exact: `int(density * scalars)` are kept, of equal ones the
    earlier. Two passes over the sequence find where to cut, by histograms of the upper and the lower half of the
    magnitudes' fp32 bits, which are ordered as the magnitudes are. Then each piece is trimmed in its turn.

    Args:
        pieces: makes the sequence, anew at each call.
        density: the share to keep.
    """

    def __init__(self, pieces: Callable[[], Iterable[torch.Tensor]], density: float):
        upper, lower = torch.zeros(2**15, dtype=torch.long), torch.zeros(2**16, dtype=torch.long)
        for piece in pieces():
            upper += torch.bincount(_magnitude(piece) >> 16, minlength=len(upper))
        start, wanted = _from_above(upper, int(density * int(upper.sum())))
        for piece in pieces():
            bits = _magnitude(piece)
            lower += torch.bincount(bits[bits >> 16 == start] & 0xFFFF, minlength=len(lower))
        end, self.ties = _from_above(lower, wanted)
        self.cut = start << 16 | end

    def __call__(self, piece: torch.Tensor) -> torch.Tensor:
        """The next piece, trimmed."""
        bits = _magnitude(piece)
        keep = bits > self.cut
        if self.ties:
            ties = (bits == self.cut).nonzero()[: self.ties, 0]
            keep[ties] = True
            self.ties -= len(ties)
        return piece * keep


def _magnitude(delta: torch.Tensor) -> torch.Tensor:
    return delta.float().abs().view(torch.int32)


def _from_above(histogram: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the last of the `wanted` largest, and how many of them are in it."""
    counts = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(counts, wanted))
    return len(histogram) - 1 - place, wanted - (int(counts[place - 1]) if place else 0)


def slerp_factors(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], t: float) -> tuple[float, float, str]:
    """Factors of two tensors, given piece by piece, in their spherical interpolation.

    Fine-tuned weights are so near to each other that this is linear interpolation for nearly all tensors.

    Returns:
        The factors of the first and the second tensor, and `arc`, or `line` where |cos| > 0.9995.
    """
    products = torch.zeros(3, dtype=torch.float64)
    for a, b in pairs:
        a, b = a.double(), b.double()  # noqa: PLW2901
        products += torch.stack([a @ b, a @ a, b @ b])
    dot, norm_a, norm_b = products.tolist()
    cos = dot / math.sqrt(norm_a * norm_b) if norm_a and norm_b else 0.0
    if abs(cos) > LINE:
        return 1 - t, t, "line"
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), "arc"
