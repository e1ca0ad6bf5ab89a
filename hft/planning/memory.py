"""What weights, gradients and optimizer state of a run take per device, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from hft.machine import world_size
from hft.methods import Method
from hft.selection import Selection

if TYPE_CHECKING:
    from hft.methods.adapter import AdapterFootprint

GIB = 2**30
# Above this many parameters a run on a CPU is a mistake unless it was asked for by name.
CPU_MODEL_SIZE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes per device by what they are for; activations come on top.

    Attributes:
        weights: frozen parameters, and the frozen values of partly frozen ones, in the checkpoint's dtype.
        master_weights: fp32, of what trains. Partly frozen parameters have them, gradients and moments whole.
        gradients: fp32.
        moments: AdamW's two, fp32.
        reference: DPO's, a copy of the trained half, or of everything if the model is sharded.
        method: what the method keeps beside them, such as the starting weights.
        buckets: DDP's copy of all gradients, from which it sends them.
    """

    weights: float
    master_weights: float
    gradients: float
    moments: float
    reference: float = 0.0
    method: float = 0.0
    buckets: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def table(self) -> str:
        """One line per part that takes anything, in GiB, and their sum."""
        names = {"master_weights": "fp32 master weights", "moments": "optimizer moments", "buckets": "DDP buckets"}
        parts = {names.get(f.name, f.name): getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        rows = [f"{name:20} {size / GIB:9.3f} GiB" for name, size in parts.items()]
        return "\n".join([*rows, f"{'sum':20} {self.total / GIB:9.3f} GiB per device before activations"])


def memory_of(
    method: Method,
    selection: Selection | AdapterFootprint,
    *,
    reference: bool = False,
    shards: int = 1,
    processes: int = 1,
    frozen_bytes: int = 2,
) -> Memory:
    """The memory of a run.

    Args:
        method: how parameters change.
        selection: what trains.
        reference: whether DPO keeps a reference model.
        shards: devices that the model is sharded over (FSDP2); 1 under DDP and on one device.
        processes: of the run.
        frozen_bytes: bytes of a frozen parameter.
    """
    held = selection.num_with_optimizer_state
    buckets = 4 * held if processes > shards else 0
    if method.adapter:  # the reference is the base itself, with the adapter switched off
        return Memory(selection.base_bytes(frozen_bytes), 4 * held, 4 * held, 8 * held, buckets=buckets)
    size = selection.anatomy.numel
    at_once = method.schedule.peak_numel(selection) if method.schedule else held
    copied = (held if shards == 1 else size) if reference else 0
    kept = sum(part.memory(selection) for part in (method.update, method.strategy) if part)
    # Of partly frozen parameters, the frozen values are kept a second time.
    frozen = size - selection.num_trained
    return Memory(
        weights=frozen * frozen_bytes / shards,
        master_weights=4 * held / shards,
        gradients=4 * at_once / shards,
        moments=8 * at_once / shards,
        reference=copied * frozen_bytes / shards,
        method=kept / (1 if method.update and method.update.replicated else shards),
        buckets=buckets,
    )


def why_it_does_not_fit(
    method: Method, selection: Selection | AdapterFootprint, *, reference: bool, shards: int, use_cpu: bool
) -> str | None:
    """A sentence if this machine cannot hold a run, else None.

    Args:
        method: how parameters change.
        selection: what trains.
        reference: whether DPO keeps a reference model.
        shards: devices that the model is sharded over.
        use_cpu: whether the CPU was asked for by name, however large the model is.
    """
    import psutil
    import torch

    def needed(**how: int) -> float:
        return memory_of(method, selection, reference=reference, **how).total / GIB

    size = f"{selection.anatomy.numel / 1e9:.1f}B parameters"
    if torch.accelerator.is_available() and not use_cpu:
        need = needed(shards=shards, processes=world_size())
        if torch.cuda.is_available() and need > (have := torch.cuda.get_device_properties(0).total_memory / GIB):
            more = "; shard it over more GPUs with FSDP2" if method.shardable else ""
            return f"{size} need {need:.1f} GiB per device before activations and each has {have:.1f} GiB{more}"
        return None
    if selection.anatomy.numel > CPU_MODEL_SIZE and not use_cpu:
        eight = f", {needed(shards=8, processes=8):.1f} GiB each on 8" if method.shardable else ""
        return (
            f"{size} need a GPU and this machine has none: {needed():.1f} GiB before activations on one{eight} "
            "(--use_cpu true if you mean the CPU)"
        )
    need, have = needed(frozen_bytes=4), psutil.virtual_memory().total / GIB
    return f"{size} need {need:.1f} GiB before activations; this machine has {have:.1f} GiB" if need > have else None
