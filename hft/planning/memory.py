"""What a run takes per device: weights, gradients, optimizer state, activations, before anything is loaded."""

from dataclasses import dataclass

from hft.freezing import is_wide
from hft.methods import Method
from hft.parts import index_bytes
from hft.planning.costs import StepCosts
from hft.planning.engine import Engine
from hft.selection import Selection

GIB = 2**30
# Names in a table of the parts that have another name there.
LABELS = {
    "master_weights": "fp32 master weights",
    "moments": "optimizer moments",
    "buckets": "DDP buckets",
    "gathered": "gathered from shards",
    "transient": "transient at peak",
}
# What comes on top of the state while a micro-batch is computed.
WORKING = ("gathered", "activations", "transient")


@dataclass(frozen=True)
class Memory:
    """Bytes per device by what they are for."""

    weights: float  # frozen parameters, those that train in part whole; and which elements train
    master_weights: float  # fp32, of what trains
    gradients: float  # fp32
    moments: float  # AdamW's two, fp32; none of SGD
    reference: float = 0.0  # of a reference model, a copy of the trained half, or of everything if the model is sharded
    method: float = 0.0  # what the method keeps beside them, such as the starting weights
    buckets: float = 0.0  # DDP's copy of all gradients, from which it sends them
    gathered: float = 0.0  # what a sharded model holds whole at one time, about (`gathered_bytes`)
    activations: float = 0.0  # what autograd holds between the forward and the backward pass of a micro-batch
    transient: float = 0.0  # the most that a micro-batch takes beside them at one time (`StepCosts.transient`)

    @property
    def total(self) -> float:
        """The peak where gradients are accumulated over micro-batches; without that it is lower."""
        return sum(vars(self).values())

    @property
    def state(self) -> float:
        """What a device holds all the time."""
        return sum(size for name, size in vars(self).items() if name not in WORKING)

    def table(self) -> str:
        """One line per part that takes anything, in GiB, and their sum."""
        rows = [f"{LABELS.get(name, name):20} {size / GIB:9.3f} GiB" for name, size in vars(self).items() if size]
        what = "per device, at most" if self.activations else "per device before activations"
        return "\n".join([*rows, f"{'sum':20} {self.total / GIB:9.3f} GiB {what}"])


def memory_of(
    method: Method,
    selection: Selection,
    engine: Engine | None = None,
    *,
    reference: bool = False,
    costs: StepCosts | None = None,
) -> Memory:
    """The memory of a run, by default on one GPU in bf16, with activations where the costs of a step are known."""
    engine = engine or Engine()
    held, moments, shards = selection.num_trained, engine.moments_bytes, engine.shards
    buckets = 4 * held if engine.processes > shards else 0
    working = {"activations": costs.saved, "transient": costs.transient} if costs else {}
    if method.adapter:  # the reference is the base itself, with the adapter switched off
        base = selection.base_bytes(engine.frozen_bytes)
        return Memory(base, 4 * held, 4 * held, moments * held, buckets=buckets, **working)
    at_once = method.schedule.peak_numel(selection) if method.schedule else held
    reference |= bool(method.strategy and method.strategy.extra_rows().reference)
    kept = sum(part.memory(selection) for part in (method.update, method.strategy) if part)
    anatomy, masks = selection.anatomy, selection.frozen_masks
    whole = {name: anatomy.numels[name] for name in (*selection.frozen_parameters, *masks)}
    frozen = engine.frozen_bytes * sum(whole.values())
    if shards == 1:  # embeddings of the input hand their fp32 on to the layers; ends and norms in part are held in it
        wide = [name for name in masks if name not in anatomy.shapes or is_wide(name, len(anatomy.shapes[name]))]
        first = next(iter(anatomy.embeddings))
        frozen += (4 - engine.frozen_bytes) * sum(whole.get(name, 0) for name in {first, *wide})
    index = sum(index_bytes(mask, anatomy.shapes.get(name, mask.shape)) for name, mask in masks.items())
    return Memory(
        weights=frozen / shards + index,
        master_weights=4 * held / shards,
        gradients=4 * at_once / shards,
        moments=moments * at_once / shards,
        reference=planned_reference_bytes(selection, engine) if reference else 0,
        method=kept / (1 if method.update and method.update.replicated else shards),
        buckets=buckets,
        gathered=gathered_bytes(selection, engine.precision.trained.itemsize) if shards > 1 and costs else 0,
        **working,
    )


def planned_reference_bytes(selection: Selection, engine: Engine) -> float:
    """A reference model beside what it shares with the policy; on one device it copies what trains whole."""
    anatomy, frozen = selection.anatomy, engine.frozen_bytes
    if engine.shards > 1:
        return anatomy.numel * frozen / engine.shards
    linear = {name for name, parts in anatomy.parts_by_parameter.items() if parts[0][0].block in ("attention", "mlp")}
    linear.update([*anatomy.embeddings][1:])
    copied = (name for name in selection.trained_parameters if name not in selection.frozen_masks)
    return sum(anatomy.numels[name] * (frozen if name in linear else 4) for name in copied)


def gathered_bytes(selection: Selection, itemsize: int) -> float:
    """Bytes that a sharded model holds whole at one time, about.

    These are two layers and what lies outside the layers in the dtype that it computes with; the gradients of one
    layer, in that dtype and in fp32 to be reduced; and of what trains in part the gradient of one whole weight.
    """
    anatomy, masks, frozen = selection.anatomy, selection.frozen_masks, set(selection.frozen_parameters)
    layers: list[list[int]] = [[0, 0, 0] for _ in range(anatomy.num_layers)]
    for name, parts in anatomy.parts_by_parameter.items():
        numel, layer = anatomy.numels[name], layers[parts[0][0].layer]
        trained = 0 if name in frozen else selection.num_trained_of(name)
        layer[0] += numel + (trained if name in masks else 0)
        layer[1] += trained
        layer[2] = max(layer[2], numel if name in masks else 0)
    outside = sum((anatomy.embeddings | anatomy.others).values())
    size, gradients, whole = (max(column) for column in zip(*layers, strict=True))
    return itemsize * (2 * size + outside + whole) + (itemsize + 4) * gradients
