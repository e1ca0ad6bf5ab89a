"""Where a run computes: processes, shards, precision, and the micro-batch of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError
from hft.machine import cpu_has_bfloat16, is_sharded, is_zero3, world_size
from hft.planning.costs import BFLOAT16, FLOAT32, MIXED, Precision

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, TrainingArguments

    from hft.runs.config import Config

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
    """The engine of this machine, or of so many GPUs; an optimizer whose state is not known counts as AdamW."""
    import torch

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
    stored = asked_dtype(values) or getattr(model_config.get_text_config(), "dtype", None) or torch.bfloat16
    moments = MOMENTS.get(values.get("optim") or "adamw_torch", MOMENTS["adamw_torch"])
    return Engine(processes, shards, precision, max(precision.frozen.itemsize, stored.itemsize), on_gpu, moments)


def asked_dtype(values: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype in `model_init_kwargs`, if it names one."""
    import torch

    named = (values.get("model_init_kwargs") or {}).get("dtype")
    if named in (None, "auto") or isinstance(named, torch.dtype):
        return None if named == "auto" else named
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise HFTError(f"model_init_kwargs: torch has no dtype {named!r}; take float32, bfloat16 or auto")
    return found


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that a device computes at once, and how."""

    rows: int  # sequences
    length: int  # tokens of each
    attention: str | None  # transformers' name of an implementation; None for the model's own
    padded: bool  # whether attention needs a mask
    forward_rows: int  # sequences that it computes without gradients, the reference's included


def micro_batch(config: Config, args: TrainingArguments, examples: int | None = None) -> MicroBatch:
    """The micro-batch of a run, as configured or of so many examples; refuses settings whose cost is not known."""
    if args.max_length is None:
        raise HFTError("FLOPs and activations are not known without max_length")
    if getattr(args, "activation_offloading", False):
        raise HFTError("FLOPs and activations with activation_offloading are not known")
    if getattr(args, "kl_to_base", 0):
        raise HFTError(
            "FLOPs and activations with kl_to_base are not known: the base's forward pass, two sets of logits"
        )
    kwargs = args.activation_checkpointing_kwargs or {}
    if named := [key for key in ("use_reentrant", "selective", "offload") if kwargs.get(key)]:
        raise HFTError(f"FLOPs and activations with {named[0]} checkpointing are not known")
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
    return MicroBatch(rows, length, attention, not flash and (flat or (rows > 1 and not full)), forward)
