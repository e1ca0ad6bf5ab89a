"""A run on given GPUs beside full fine-tuning and its cheapest rival: memory, FLOPs, GPU-hours, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm import tqdm

from hft.errors import HFTError
from hft.machine import device_bytes
from hft.planning.costs import StepCosts, fewest_checkpointed_layers
from hft.planning.memory import GIB, LABELS, Memory

UNITS = {"tib": 2**40, "gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6, "g": 2**30}
# Fraction of a device that a plan leaves free, for what it does not know: CUDA's context, workspaces, fragments.
SPARE = 0.05


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
        found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", self.gpu_memory.lower())
        size = float(found[1]) * UNITS.get(found[2] or "gib", 0) if found else 0
        if not size:
            raise HFTError(f"gpu_memory: expected a size such as 80GiB or 24GB, got {self.gpu_memory!r}")
        return size


def usable_bytes(outlook: Outlook | None, *, use_cpu: bool = False) -> float | None:
    """What a run may take of a device: of the GPUs it is planned for, or of this machine's GPU or memory, less `SPARE`.

    None for GPUs whose memory was not given and that are not here either.
    """
    import torch

    given = outlook.bytes_of_gpu() if outlook else None
    if given is None and outlook and outlook.gpus and not torch.cuda.is_available():
        return None
    return (given or device_bytes(use_cpu=use_cpu)) * (1 - SPARE)


@dataclass(frozen=True)
class Candidate:
    """One way of training, on one device.

    Attributes:
        name: of the method.
        memory: per device, with activations.
        costs: of a micro-batch, given the layers that are checkpointed and, if they are not the recipe's, its rows.
        checkpointed: those that the recipe checkpoints.
        layers: number of layers.
    """

    name: str
    memory: Memory
    costs: Callable[..., StepCosts]
    checkpointed: tuple[int, ...]
    layers: int

    @property
    def step(self) -> StepCosts:
        """A micro-batch as the recipe has it."""
        return self.costs(self.checkpointed)

    def fewest(self, available: float) -> int | None:
        """The fewest layers that must be checkpointed to fit into a device of so many bytes; None if it never fits."""
        return fewest_checkpointed_layers(self.costs, self.layers, available - self.memory.state - self.memory.gathered)


Rows = list[tuple[str, list[str]]]


def memory_block(candidates: list[Candidate]) -> tuple[str, Rows]:
    """Memory by part, and the sum, also relative to the first candidate."""
    parts = [candidate.memory.parts() for candidate in candidates]
    names = [name for name in parts[0] if any(part[name] for part in parts)]
    totals = [candidate.memory.total for candidate in candidates]
    unit, size = ("GiB", GIB) if max(totals) >= GIB else ("MiB", 2**20)
    rows = [(LABELS.get(name, name), [f"{part[name] / size:.2f}" for part in parts]) for name in names]
    rows += [("peak, at most", [f"{total / size:.2f}" for total in totals]), _relative(totals)]
    return f"{unit} per device", rows


def flops_block(candidates: list[Candidate]) -> tuple[str, Rows]:
    """FLOPs per token by pass, and the sum, also relative to the first candidate."""
    steps = [candidate.step for candidate in candidates]
    totals = [step.flops / step.tokens for step in steps]
    unit, size = ("GFLOPs", 1e9) if max(totals) >= 1e8 else ("MFLOPs", 1e6)
    rows = []
    for name in ("forward", "backward", "recompute", "reference"):
        flops = [getattr(step, name) for step in steps]
        cells = [f"{f / step.tokens / size:.2f}" for f, step in zip(flops, steps, strict=True)]
        rows += [(name, cells)] if any(flops) else []
    rows += [("sum", [f"{total / size:.2f}" for total in totals]), _relative(totals)]
    return f"{unit} per token", rows


def fitting_block(candidates: list[Candidate], available: float) -> tuple[str, Rows]:
    """Whether each fits as the recipe has it, the fewest layers that must be checkpointed, and its FLOPs with these."""
    whole = available / (1 - SPARE)
    fewest = [candidate.fewest(available) for candidate in candidates]
    first = candidates[0].step.flops
    best = [None if n is None else c.costs(range(n)).flops / first for c, n in zip(candidates, fewest, strict=True)]
    rows = [
        ("fits", ["yes" if c.memory.total <= available else "no" for c in candidates]),
        ("fewest checkpointed layers", ["none fits" if n is None else str(n) for n in fewest]),
        ("FLOPs with these, to fft", ["-" if ratio is None else f"{ratio:.3f}" for ratio in best]),
    ]
    return f"in {whole / GIB:.3g} GiB, {(whole - available) / GIB:.2g} of them left free", rows


def hours_block(candidates: list[Candidate], tokens: int, outlook: Outlook) -> tuple[str, Rows]:
    """GPU-hours for so many tokens."""
    rate = outlook.gpu_tflops * 1e12 * outlook.mfu
    hours = [candidate.step.flops / candidate.step.tokens * tokens / rate / 3600 for candidate in candidates]
    count = tqdm.format_sizeof(tokens).replace("G", "B")
    title = f"{count} tokens at {outlook.mfu:.0%} of {outlook.gpu_tflops:g} TFLOP/s"
    return title, [("GPU-hours", [f"{h:,.0f}" if h >= 100 else f"{h:.2g}" for h in hours])]


def in_columns(heads: list[str], blocks: list[tuple[str, Rows]]) -> str:
    """Blocks of rows, each below its title, in columns as wide as what is in them."""
    rows = [row for _, block in blocks for row in block]
    first = max(len(name) for name, _ in rows) + 2
    widths = [max(map(len, column)) for column in zip(heads, *(cells for _, cells in rows), strict=True)]
    lines = []
    for number, (title, block) in enumerate(blocks):
        lines.append(f"{title}:" if number else _line(f"{title}:", heads, max(first, len(title) - 1), widths))
        lines += [_line(f"  {name}", cells, first, widths) for name, cells in block]
    return "\n".join(line.rstrip() for line in lines)


def what_to_change(
    candidate: Candidate, available: float, *, rows: int, batch: int, shards: int, shardable: bool
) -> str | None:
    """A sentence about what makes a run fit that does not, or None if it fits.

    Args:
        candidate: the run.
        available: bytes of a device that it may take.
        rows: of a micro-batch, on each device.
        batch: rows of a step, on each device.
        shards: devices that the model is sharded over.
        shardable: whether the method can be sharded.
    """
    memory = candidate.memory
    if memory.total <= available:
        return None
    lacking = f"it lacks {(memory.total - available) / GIB:.1f} GiB"
    if (fewest := candidate.fewest(available)) is not None:
        return f"{lacking}: --activation_checkpointing_layers {fewest} (of {candidate.layers}) makes it fit"
    left, every = available - memory.state - memory.gathered, range(candidate.layers)
    divisors = [n for n in range(rows - 1, 0, -1) if not batch % n]
    if fewer := next((n for n in divisors if candidate.costs(every, n).peak <= left), None):
        checkpointed = "" if len(candidate.checkpointed) == candidate.layers else ", with all layers checkpointed"
        return f"{lacking}: lower --per_device_train_batch_size from {rows} to {fewer}{checkpointed}"
    if candidate.costs(every, 1).transient < left:
        return f"{lacking}, and one row with all layers checkpointed is too long: lower --max_length"
    if not shardable:
        return f"{lacking}, and this method cannot be sharded: take GPUs with more memory, or a smaller model"
    how = "shard it over more GPUs" if shards > 1 else "shard it over several GPUs with FSDP2"
    return f"{lacking}, {memory.state / GIB:.1f} GiB being state: {how}"


def _relative(values: list[float]) -> tuple[str, list[str]]:
    return "relative to fft", [f"{value / values[0]:.3f}" for value in values]


def _line(name: str, cells: list[str], first: int, widths: list[int]) -> str:
    return f"{name:{first + 2}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
