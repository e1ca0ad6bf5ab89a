"""A run on given GPUs beside full fine-tuning and its cheapest rival: memory, FLOPs, GPU-hours, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hft.errors import HFTError
from hft.planning.costs import StepCosts, fewest_checkpointed_layers
from hft.planning.memory import GIB, LABELS, Memory

UNITS = {"gib": 2**30, "gb": 10**9, "g": 2**30}


@dataclass
class Outlook:
    """The machine that a plan is made for, where it is not this one. The fields are keys of `hft plan`."""

    gpus: int | None = field(default=None, metadata={"help": "Number of GPUs that the run would have."})
    gpu_memory: str | None = field(
        default=None, metadata={"help": "Memory of each, such as 80GiB or 24GB; by default that of the ones here."}
    )
    mfu: float = field(
        default=0.4, metadata={"help": "Fraction of the GPU's peak that the run is to reach, recomputation included."}
    )
    gpu_tflops: float = field(
        default=312.0,
        metadata={"help": "The GPU's peak in TFLOP/s, in bf16 without sparsity: A100 312, H100 989."},
    )
    exact: bool = field(
        default=False, metadata={"help": "Also count a micro-batch by running it on fake tensors; takes a minute."}
    )

    def __post_init__(self):
        if self.gpus is not None and self.gpus < 1:
            raise HFTError(f"gpus must be at least 1, got {self.gpus}")
        if not 0 < self.mfu <= 1:
            raise HFTError(f"mfu must lie in 0..1, got {self.mfu}")
        if self.gpu_tflops <= 0:
            raise HFTError(f"gpu_tflops must be above 0, got {self.gpu_tflops}")
        self.bytes_of_gpu()

    def bytes_of_gpu(self) -> float | None:
        """Bytes of a GPU, if they were given."""
        if self.gpu_memory is None:
            return None
        number, unit = re.fullmatch(r"\s*([\d.]*)\s*([a-z]*)\s*", self.gpu_memory.lower()).groups() or ("", "")
        try:
            return float(number) * UNITS[unit or "gib"]
        except (ValueError, KeyError):
            raise HFTError(f"gpu_memory: expected a size such as 80GiB or 24GB, got {self.gpu_memory!r}") from None


@dataclass(frozen=True)
class Candidate:
    """One way of training, on one device.

    Attributes:
        name: of the method.
        memory: per device, with activations.
        costs: of a micro-batch, given the layers that are checkpointed.
        checkpointed: those that the recipe checkpoints.
        layers: number of layers.
    """

    name: str
    memory: Memory
    costs: Callable[[Iterable[int]], StepCosts]
    checkpointed: tuple[int, ...]
    layers: int

    @property
    def step(self) -> StepCosts:
        """A micro-batch as the recipe has it."""
        return self.costs(self.checkpointed)

    def fewest(self, available: float) -> int | None:
        """The fewest layers that must be checkpointed to fit into a device of so many bytes; None if it never fits."""
        return fewest_checkpointed_layers(self.costs, self.layers, available - self.memory.state - self.memory.gathered)


def memory_rows(candidates: list[Candidate]) -> list[tuple[str, list[str]]]:
    """Memory by part, in GiB, and the sum, also relative to the first candidate."""
    parts = [candidate.memory.parts() for candidate in candidates]
    names = [name for name in parts[0] if any(part[name] for part in parts)]
    rows = [(LABELS.get(name, name), [f"{part[name] / GIB:.2f}" for part in parts]) for name in names]
    totals = [candidate.memory.total for candidate in candidates]
    return [*rows, ("peak, at most", [f"{t / GIB:.2f}" for t in totals]), _relative(totals)]


def flops_rows(candidates: list[Candidate]) -> list[tuple[str, list[str]]]:
    """GFLOPs per token by pass, and the sum, also relative to the first candidate."""
    steps = [candidate.step for candidate in candidates]
    rows = []
    for name in ("forward", "backward", "recompute", "reference"):
        flops = [getattr(step, name) for step in steps]
        rows += [(name, [f"{f / s.tokens / 1e9:.2f}" for f, s in zip(flops, steps, strict=True)])] if any(flops) else []
    totals = [step.flops / step.tokens for step in steps]
    return [*rows, ("sum", [f"{t / 1e9:.2f}" for t in totals]), _relative(totals)]


def fitting_rows(candidates: list[Candidate], available: float) -> list[tuple[str, list[str]]]:
    """Whether each fits as the recipe has it, the fewest layers that must be checkpointed, and its FLOPs with these."""
    fewest = [candidate.fewest(available) for candidate in candidates]
    first = candidates[0].step.flops
    best = [None if n is None else c.costs(range(n)).flops / first for c, n in zip(candidates, fewest, strict=True)]
    return [
        ("fits", ["yes" if c.memory.total <= available else "no" for c in candidates]),
        ("fewest checkpointed layers", ["none fits" if n is None else str(n) for n in fewest]),
        ("FLOPs with these, relative", ["-" if ratio is None else f"{ratio:.3f}" for ratio in best]),
    ]


def hours_row(candidates: list[Candidate], tokens: float, outlook: Outlook) -> tuple[str, list[str]]:
    """GPU-hours for so many tokens."""
    rate = outlook.gpu_tflops * 1e12 * outlook.mfu
    return "GPU-hours", [f"{c.step.flops / c.step.tokens * tokens / rate / 3600:,.0f}" for c in candidates]


def in_columns(heads: list[str], blocks: list[tuple[str, list[tuple[str, list[str]]]]]) -> str:
    """Blocks of rows, each below its title, in columns as wide as what is in them."""
    rows = [row for _, block in blocks for row in block]
    first = max(len(name) for name, _ in rows) + 2
    widths = [max(map(len, column)) for column in zip(heads, *(cells for _, cells in rows), strict=True)]
    lines = []
    for number, (title, block) in enumerate(blocks):
        lines.append(f"{title}:" if number else _line(f"{title}:", heads, max(first, len(title) - 1), widths))
        lines += [_line(f"  {name}", cells, first, widths) for name, cells in block]
    return "\n".join(line.rstrip() for line in lines)


def what_to_change(candidate: Candidate, available: float, *, rows: int, shards: int, shardable: bool) -> str | None:
    """A sentence about what makes a run fit that does not, or None if it fits.

    Args:
        candidate: the run.
        available: bytes of a device.
        rows: on each device.
        shards: devices that the model is sharded over.
        shardable: whether the method can be sharded.
    """
    memory = candidate.memory
    if memory.total <= available:
        return None
    lacking = f"it lacks {(memory.total - available) / GIB:.1f} GiB"
    if (fewest := candidate.fewest(available)) is not None:
        every = "all" if fewest == candidate.layers else f"{fewest} of {candidate.layers}"
        return f"{lacking}: checkpoint the activations of {every} layers"
    if memory.state + memory.gathered < available and rows > 1:
        return f"{lacking}: lower --per_device_train_batch_size from {rows}, with activation checkpointing on"
    if not shardable:
        return f"{lacking}, and this method cannot be sharded: take GPUs with more memory, or a smaller model"
    how = "shard it over more GPUs" if shards > 1 else "shard it over several GPUs with FSDP2"
    return f"{lacking}, {memory.state / GIB:.1f} GiB being state: {how}"


def _relative(values: list[float]) -> tuple[str, list[str]]:
    return "relative", [f"{value / values[0]:.3f}" for value in values]


def _line(name: str, cells: list[str], first: int, widths: list[int]) -> str:
    return f"{name:{first + 2}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
