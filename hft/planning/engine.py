"""Where a run computes: processes, shards, precision, and the micro-batch of a device."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, TrainingArguments

from hft.errors import HFTError
from hft.machine import cpu_has_bfloat16, is_sharded, is_zero3, world_size
from hft.model.load import asked_dtype
from hft.planning.counting import BFLOAT16, FLOAT32, MIXED, Precision
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
