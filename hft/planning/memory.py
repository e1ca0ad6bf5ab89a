"""What a run takes per device: weights, gradients, optimizer state, activations, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from hft.machine import device_bytes, world_size
from hft.methods import Method
from hft.selection import Selection

if TYPE_CHECKING:
    from hft.methods.adapter import AdapterFootprint
    from hft.planning.costs import StepCosts

GIB = 2**30
# Above this many parameters a run on a CPU is a mistake unless it was asked for by name.
CPU_MODEL_SIZE = 1_000_000_000
# Names in a table of the parts that have another name there.
LABELS = {
    "master_weights": "fp32 master weights",
    "moments": "optimizer moments",
    "buckets": "DDP buckets",
    "gathered": "gathered from shards",
    "transient": "on top, at the peak",
}
# Bytes of an optimizer's state per trained parameter, by the name that `optim` has for it.
MOMENTS = {"adamw_torch": 8, "adamw_torch_fused": 8, "sgd": 0}
# What comes on top of the state while a micro-batch is computed.
WORKING = ("gathered", "activations", "transient")


@dataclass(frozen=True)
class Memory:
    """Bytes per device by what they are for.

    Attributes:
        weights: frozen parameters, and the frozen values of partly frozen ones, in the dtype they are held in.
        master_weights: fp32, of what trains. Partly frozen parameters have them, gradients and moments whole.
        gradients: fp32.
        moments: AdamW's two, fp32; none of SGD.
        reference: DPO's, a copy of the trained half, or of everything if the model is sharded.
        method: what the method keeps beside them, such as the starting weights.
        buckets: DDP's copy of all gradients, from which it sends them.
        gathered: what a sharded model holds whole at one time, about: two layers and what lies outside the layers in
            the dtype that it computes with, and the gradients of one layer, in that dtype and in fp32 to be reduced.
        activations: what autograd holds between the forward and the backward pass of a micro-batch.
        transient: the most that a micro-batch takes beside them at one time (`StepCosts.transient`).
    """

    weights: float
    master_weights: float
    gradients: float
    moments: float
    reference: float = 0.0
    method: float = 0.0
    buckets: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    transient: float = 0.0

    @property
    def total(self) -> float:
        """All of it: the peak, where gradients are accumulated over micro-batches; less where they are not."""
        return sum(self.parts().values())

    @property
    def state(self) -> float:
        """What a device holds all the time."""
        return sum(size for name, size in self.parts().items() if name not in WORKING)

    def parts(self) -> dict[str, float]:
        """Bytes by what they are for."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def table(self) -> str:
        """One line per part that takes anything, in GiB, and their sum."""
        parts = {LABELS.get(name, name): size for name, size in self.parts().items() if size}
        rows = [f"{name:20} {size / GIB:9.3f} GiB" for name, size in parts.items()]
        what = "per device, at most" if self.activations else "per device before activations"
        return "\n".join([*rows, f"{'sum':20} {self.total / GIB:9.3f} GiB {what}"])


def memory_of(
    method: Method,
    selection: Selection | AdapterFootprint,
    *,
    reference: bool = False,
    shards: int = 1,
    processes: int = 1,
    frozen_bytes: int = 2,
    gathered_bytes: int = 2,
    moments_bytes: int = 8,
    costs: StepCosts | None = None,
) -> Memory:
    """The memory of a run.

    Args:
        method: how parameters change.
        selection: what trains.
        reference: whether DPO keeps a reference model.
        shards: devices that the model is sharded over (FSDP2); 1 under DDP and on one device.
        processes: of the run.
        frozen_bytes: bytes of a frozen parameter.
        gathered_bytes: bytes of a parameter that is gathered from its shards.
        moments_bytes: bytes of the optimizer's state per trained parameter.
        costs: of a micro-batch, where they are known.
    """
    held = selection.num_with_optimizer_state
    buckets = 4 * held if processes > shards else 0
    if method.adapter:  # the reference is the base itself, with the adapter switched off
        return Memory(selection.base_bytes(frozen_bytes), 4 * held, 4 * held, moments_bytes * held, buckets=buckets)
    size = selection.anatomy.numel
    at_once = method.schedule.peak_numel(selection) if method.schedule else held
    kept = sum(part.memory(selection) for part in (method.update, method.strategy) if part)
    # Of partly frozen parameters, the frozen values are kept a second time.
    frozen = (size - selection.num_trained) * frozen_bytes
    if shards == 1 and selection.config.freeze_embeddings:  # those of the input hand their fp32 on to the layers
        frozen += (4 - frozen_bytes) * next(iter(selection.anatomy.embeddings.values()))
    return Memory(
        weights=frozen / shards,
        master_weights=4 * held / shards,
        gradients=4 * at_once / shards,
        moments=moments_bytes * at_once / shards,
        reference=reference_bytes(selection, shards, frozen_bytes) if reference else 0,
        method=kept / (1 if method.update and method.update.replicated else shards),
        buckets=buckets,
        gathered=gathered(selection, gathered_bytes) if shards > 1 and costs else 0,
        activations=costs.saved if costs else 0,
        transient=costs.transient if costs else 0,
    )


def reference_bytes(selection: Selection, shards: int, frozen_bytes: int) -> float:
    """DPO's reference beside what it shares with the policy.

    On one device it copies what trains: matrices in the checkpoint's dtype, and in fp32 what is not a linear layer.
    """
    anatomy = selection.anatomy
    if shards > 1:
        return anatomy.numel * frozen_bytes / shards
    blocks = {name: parts[0][0].block for name, parts in anatomy.parts_by_parameter.items()}
    first = next(iter(anatomy.embeddings))
    numels = {name: math.prod(shape) for name, shape in anatomy.shapes.items()}
    numels |= anatomy.embeddings | anatomy.others

    def is_linear(name: str) -> bool:
        return blocks.get(name) in ("attention", "mlp") or (name in anatomy.embeddings and name != first)

    return sum(numels[n] * (frozen_bytes if is_linear(n) else 4) for n in selection.trained_parameters)


def gathered(selection: Selection, itemsize: int) -> float:
    """Bytes that a sharded model holds whole at one time (`Memory.gathered`)."""
    anatomy, trained = selection.anatomy, set(selection.trained_parameters)
    layers: list[list[int]] = [[0, 0] for _ in range(anatomy.num_layers)]
    for name, parts in anatomy.parts_by_parameter.items():
        numel = math.prod(anatomy.shapes[name])
        layers[parts[0][0].layer][0] += numel
        layers[parts[0][0].layer][1] += numel * (name in trained)
    outside = sum((anatomy.embeddings | anatomy.others).values())
    size, gradients = (max(column) for column in zip(*layers, strict=True))
    return itemsize * (2 * size + outside) + (itemsize + 4) * gradients


def why_it_does_not_fit(
    method: Method,
    selection: Selection | AdapterFootprint,
    *,
    reference: bool,
    shards: int,
    use_cpu: bool,
    optim: str | None = None,
) -> str | None:
    """A sentence if this machine cannot hold a run, else None.

    Args:
        method: how parameters change.
        selection: what trains.
        reference: whether DPO keeps a reference model.
        shards: devices that the model is sharded over.
        use_cpu: whether the CPU was asked for by name, however large the model is.
        optim: name of the optimizer; one whose state is not known counts as if it had none.
    """
    import psutil
    import torch

    def needed(**how: int) -> float:
        moments = MOMENTS.get(optim or "adamw_torch", 0)
        return memory_of(method, selection, reference=reference, moments_bytes=moments, **how).total / GIB

    size = f"{selection.anatomy.numel / 1e9:.1f}B parameters"
    if torch.accelerator.is_available() and not use_cpu:
        need = needed(shards=shards, processes=world_size())
        if torch.cuda.is_available() and need > (have := device_bytes() / GIB):
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
