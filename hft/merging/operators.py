"""How tensors are merged, beside what `peft.utils.merge_utils` has: pure functions on tensors in fp32 or better."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from tqdm import tqdm

TensorOf = Callable[[str], torch.Tensor]  # a parameter, by its name
# Elements that are added up in fp64 at a time, so that no tensor is copied to fp64 as a whole.
BLOCK_NUMEL = 2**18
# Above this |cos| slerp interpolates linearly, as mergekit does.
COLINEAR_COS = 0.9995


def blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one size, flat, `BLOCK_NUMEL` elements of each at a time."""
    return zip(*(tensor.reshape(-1).split(BLOCK_NUMEL) for tensor in tensors), strict=True)


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return sum(tensor * weight for tensor, weight in zip(tensors, weights, strict=True))


def between(base: torch.Tensor, tuned: torch.Tensor, alpha: float) -> torch.Tensor:
    """WiSE-FT: on the line from a base, 0, to what was tuned from it, 1; where the two agree, their bits."""
    return torch.where(base == tuned, base, torch.lerp(base, tuned, alpha))


def generator_of(key: str) -> torch.Generator:
    """A random generator that depends on the key alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    return torch.Generator().manual_seed(seed)


class MagnitudePruner:
    """TIES' trim: keeps the fraction of a delta, tuned - base, that is largest in magnitude; the rest becomes zero.

    The `int(density * elements)` largest, `wanted`, are kept, and with them every element as large as the smallest of
    these, as the authors' code does; `ties` of the wanted are that small, and `smallest` is this magnitude's fp32 bits.
    Two passes over `delta_of(name)` find it, by histograms of the upper and the lower half of the bits, which are
    ordered as the magnitudes are.
    """

    def __init__(self, delta_of: TensorOf, names: Sequence[str], density: float | Fraction):
        def histogram(half: Callable[[torch.Tensor], torch.Tensor], bins: int) -> torch.Tensor:
            bar = tqdm(names, desc="finding where to cut", unit="tensor", leave=False, disable=len(names) == 1)
            return sum(
                torch.bincount(half(magnitude_bits(block)), minlength=bins)
                for name in bar
                for (block,) in blocks(delta_of(name))
            )

        upper = histogram(lambda bits: bits >> 16, 2**15)
        self.wanted = int(density * int(upper.sum()))
        start, rest = _bin_of(upper, self.wanted)
        lower = histogram(lambda bits: bits[bits >> 16 == start] & 0xFFFF, 2**16)
        end, self.ties = _bin_of(lower, rest)
        self.smallest = start << 16 | end

    def __call__(self, delta: torch.Tensor) -> torch.Tensor:
        return delta * (magnitude_bits(delta) >= self.smallest) if self.wanted else torch.zeros_like(delta)


def magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    """The fp32 bits of magnitudes, as int32."""
    return delta.float().abs().view(torch.int32)


def _bin_of(histogram: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the last of the `wanted` largest, and how many of them are in it."""
    counts = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(counts, wanted))
    return len(histogram) - 1 - index, wanted - (int(counts[index - 1]) if index else 0)


def slerp_factors(first: torch.Tensor, second: torch.Tensor, t: float) -> tuple[float, float]:
    """Factors of two tensors in their spherical interpolation."""
    products = torch.zeros(3, dtype=torch.float64)
    for pair in blocks(first, second):
        a, b = pair[0].double(), pair[1].double()
        products += torch.stack([a @ b, a @ a, b @ b])
    return arc_factors(*products.tolist(), t)[:2]


def arc_factors(dot: float, norm_a: float, norm_b: float, t: float) -> tuple[float, float, str]:
    """`slerp_factors` by the dot product of two tensors and their squared norms, and the branch: `arc`, or `line` where
    |cos| > `COLINEAR_COS`, as of nearly all tensors of fine-tuned models.
    """
    cos = dot / math.sqrt(norm_a * norm_b) if norm_a and norm_b else 0.0
    if abs(cos) > COLINEAR_COS:
        return 1 - t, t, "line"
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), "arc"
