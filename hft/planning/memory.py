"""Where a run computes, and what it takes per device: weights, gradients, optimizer state, activations."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, TrainingArguments

from hft.errors import HFTError
from hft.freezing import is_wide
from hft.machine import cpu_has_bfloat16, is_sharded, is_zero3, world_size
from hft.methods import Method
from hft.model.load import asked_dtype
from hft.parts import index_bytes
from hft.planning.costs import StepCosts
from hft.planning.counting import BFLOAT16, FLOAT32, MIXED, Precision
from hft.runs.config import Config
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
# Bytes of an optimizer's state per trained parameter, by the name that `optim` has for it.
MOMENTS = {"adamw_torch": 8, "adamw_torch_fused": 8, "sgd": 0}


@dataclass(frozen=True)
class Engine:
    """Where a run computes."""

    processes: int = 1  # one per device
    shards: int = 1  # devices that the model is sharded over; 1 under DDP and on one device
    precision: Precision = MIXED  # of weights and matrix products
    frozen_bytes: int = 2  # bytes of a frozen parameter
    on_gpu: bool = True  # whether the devices are GPUs
    moments_bytes: int = 8  # bytes of the optimizer's state per trained parameter

    def __str__(self) -> str:
        if self.processes == 1:
            return "one device"
        return f"FSDP2 over {self.shards}" if self.shards > 1 else f"DDP on {self.processes}"


def engine_of(config: Config, model_config: PretrainedConfig, gpus: int | None = None) -> Engine:
    """The engine of this machine or of so many GPUs. An optimizer whose state is not known counts as AdamW."""
    values = config.values
    if gpus:
        processes, shards = gpus, gpus if config.method.shardable else 1
    else:
        processes = world_size()
        shards = processes if is_sharded() or values.get("fsdp") or values.get("deepspeed") else 1
    on_gpu = bool(gpus) or (torch.accelerator.is_available() and not values.get("use_cpu"))
    bf16 = values.get("bf16")
    half = values.get("fp16") or (bf16 if bf16 is not None else (on_gpu or cpu_has_bfloat16()))
    # ZeRO-3 computes under autocast, from what one device would hold; FSDP2 gathers everything in bf16.
    zero3 = is_zero3() or values.get("deepspeed")
    precision = (BFLOAT16 if shards > 1 and not zero3 else MIXED) if half else FLOAT32
    text = model_config.get_text_config()
    stored = asked_dtype(values.get("model_init_kwargs") or {}) or getattr(text, "dtype", None) or torch.bfloat16
    moments = MOMENTS.get(values.get("optim") or "adamw_torch", MOMENTS["adamw_torch"])
    return Engine(processes, shards, precision, max(precision.frozen.itemsize, stored.itemsize), on_gpu, moments)


def micro_batch(config: Config, args: TrainingArguments, examples: int | None = None) -> tuple[dict[str, Any], int]:
    """A device's micro-batch of so many examples as `costs_of` takes it, and its sequences without gradients.

    Refuses settings whose cost is not known.
    """
    kwargs = args.activation_checkpointing_kwargs or {}
    unknown = {
        "without max_length": args.max_length is None,
        "with activation_offloading": getattr(args, "activation_offloading", False),
        "with kl_to_base": getattr(args, "kl_to_base", 0),
    }
    unknown |= {f"with {key} checkpointing": kwargs.get(key) for key in ("use_reentrant", "selective", "offload")}
    if found := [name for name, is_set in unknown.items() if is_set]:
        raise HFTError(f"FLOPs and activations {found[0]} are not known")
    objective = config.objective
    attention = (args.model_init_kwargs or {}).get("attn_implementation")
    flash = (attention or "").startswith("flash")
    examples = examples or args.per_device_train_batch_size
    rows, length = examples * objective.sequences, args.max_length
    reference = objective.reference_sequences if objective.has_reference(config.values) else 0
    forward = examples * (objective.forward_sequences + reference)
    packed = getattr(args, "packing", False)
    full = packed and args.packing_strategy == "wrapped"
    flat = (packed and not full) or (getattr(args, "padding_free", False) and not objective.pads)
    if flat and not flash:  # one row of them all, in which a mask keeps them apart
        rows, length = 1, rows * length
    padded = not flash and (flat or (rows > 1 and not full))
    return {"rows": rows, "length": length, "attention": attention, "padded": padded}, forward


@dataclass(frozen=True)
class Memory:
    """Bytes per device by what they are for."""

    weights: float  # frozen parameters, the base's values of those that train in part, and which elements train
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
    elements, index = held_frozen(selection, shared=reference and shards == 1)
    frozen = engine.frozen_bytes * sum(elements.values())
    if shards == 1:  # embeddings of the input hand their fp32 on to the layers; ends and norms in part are held in it
        wide = [name for name in masks if name not in anatomy.shapes or is_wide(name, len(anatomy.shapes[name]))]
        first = next(iter(anatomy.embeddings))
        frozen += (4 - engine.frozen_bytes) * sum(elements.get(name, 0) for name in {first, *wide})
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


def held_frozen(selection: Selection, *, shared: bool = False) -> tuple[dict[str, int], int]:
    """Elements that are held frozen of each parameter, where a reference may share them; bytes of what says which."""
    anatomy, masks, numels = selection.anatomy, selection.frozen_masks, selection.anatomy.numels
    found = {name: index_bytes(mask, anatomy.shapes.get(name, mask.shape)) for name, mask in masks.items()}
    held = {name: numels[name] for name in (*selection.frozen_parameters, *masks)}
    held |= {n: numels[n] - selection.num_trained_of(n) for n, (_, whole) in found.items() if not (whole or shared)}
    return held, sum(size for size, _ in found.values())


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
    anatomy, frozen, (elements, _) = selection.anatomy, set(selection.frozen_parameters), held_frozen(selection)
    layers: list[list[int]] = [[0, 0, 0] for _ in range(anatomy.num_layers)]
    for name, parts in anatomy.parts_by_parameter.items():
        numel, layer = anatomy.numels[name], layers[parts[0][0].layer]
        trained = 0 if name in frozen else selection.num_trained_of(name)
        layer[0] += elements.get(name, 0) + trained
        layer[1] += trained
        layer[2] = max(layer[2], numel if name in selection.frozen_masks else 0)
    outside = sum((anatomy.embeddings | anatomy.others).values())
    size, gradients, whole = (max(column) for column in zip(*layers, strict=True))
    return itemsize * (2 * size + outside + whole) + (itemsize + 4) * gradients
