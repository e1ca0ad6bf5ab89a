"""What a run's config says about its cost: engine, precision, rows and lengths, and what is checkpointed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError
from hft.machine import cpu_has_bfloat16, is_sharded, is_zero3, world_size
from hft.methods import Method
from hft.planning.costs import StepCosts, costs_of
from hft.planning.memory import MOMENTS, Memory, memory_of
from hft.planning.outlook import Candidate, Outlook
from hft.planning.tape import BFLOAT16, FLOAT32, MIXED, Precision
from hft.runs.objective import in_pairs
from hft.selection import Selection, SelectionConfig
from hft.selection.policies import build_selection, select

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, TrainingArguments

    from hft.methods.adapter import AdapterFootprint
    from hft.model.anatomy import Anatomy
    from hft.runs.config import Config


@dataclass(frozen=True)
class Engine:
    """Where a run computes.

    Attributes:
        processes: one for each device.
        shards: devices that the model is sharded over; 1 under DDP and on one device.
        precision: of weights and matrix products.
        frozen_bytes: bytes of a frozen parameter.
        on_gpu: whether the devices are GPUs.
        moments_bytes: bytes of the optimizer's state per trained parameter.
    """

    processes: int
    shards: int
    precision: Precision
    frozen_bytes: int
    on_gpu: bool
    moments_bytes: int

    def memory(self, method: Method, selection: Selection | AdapterFootprint, **more: Any) -> Memory:
        """Memory per device of a run on it."""
        return memory_of(
            method,
            selection,
            shards=self.shards,
            processes=self.processes,
            frozen_bytes=self.frozen_bytes,
            gathered_bytes=self.precision.trained.itemsize,
            moments_bytes=self.moments_bytes,
            **more,
        )


def engine_of(config: Config, model_config: PretrainedConfig, outlook: Outlook | None) -> Engine:
    """The engine of this machine, or of the GPUs that a plan is made for: FSDP2 if the method can be sharded.

    An optimizer whose state is not known counts as AdamW.
    """
    import torch

    values, gpus = config.values, outlook.gpus if outlook else None
    if gpus:
        processes, shards = gpus, gpus if config.method.shardable else 1
    else:
        processes = world_size()
        shards = processes if is_sharded() or values.get("fsdp") or values.get("deepspeed") else 1
    on_gpu = gpus or (torch.accelerator.is_available() and not values.get("use_cpu"))
    bf16 = values.get("bf16")
    half = values.get("fp16") or (bf16 if bf16 is not None else (bool(on_gpu) or cpu_has_bfloat16()))
    # ZeRO-3 computes under autocast, from what one device would hold; FSDP2 gathers everything in bf16.
    zero3 = is_zero3() or values.get("deepspeed")
    precision = (BFLOAT16 if shards > 1 and not zero3 else MIXED) if half else FLOAT32
    stored = asked_dtype(values) or getattr(model_config.get_text_config(), "dtype", None) or torch.bfloat16
    moments = MOMENTS.get(values.get("optim") or "adamw_torch", MOMENTS["adamw_torch"])
    return Engine(processes, shards, precision, max(precision.frozen.itemsize, stored.itemsize), bool(on_gpu), moments)


def asked_dtype(values: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype in `model_init_kwargs`, if it names one.

    Raises:
        HFTError: torch has no such dtype.
    """
    import torch

    named = (values.get("model_init_kwargs") or {}).get("dtype")
    if named in (None, "auto") or isinstance(named, torch.dtype):
        return None if named == "auto" else named
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise HFTError(f"model_init_kwargs: torch has no dtype {named!r}; take float32, bfloat16 or auto")
    return found


def has_reference(config: Config) -> bool:
    return in_pairs(config.objective) and not config.values.get("precompute_ref_log_probs")


def micro_batch(config: Config, args: TrainingArguments, rows: int | None = None) -> dict[str, Any]:
    """Sequences of a micro-batch on one device, their length, and how they are computed; arguments of `costs_of`.

    Args:
        config: of the run.
        args: the trainer's config.
        rows: of a micro-batch; by default those of the config.

    Raises:
        HFTError: the config has settings whose cost is not known.
    """
    if args.max_length is None:
        raise HFTError("FLOPs and activations are not known without max_length")
    if getattr(args, "activation_offloading", False):
        raise HFTError("FLOPs and activations with activation_offloading are not known")
    attention = (args.model_init_kwargs or {}).get("attn_implementation")
    rows, length = rows or args.per_device_train_batch_size, args.max_length
    pairs, flash = in_pairs(config.objective), (attention or "").startswith("flash")
    rows *= 2 if pairs else 1
    packed = getattr(args, "packing", False)
    full = packed and args.packing_strategy == "wrapped"
    # In DPO TRL 1.16 pads whatever `padding_free` says.
    flat = (packed and not full) or (getattr(args, "padding_free", False) and not pairs)
    if flat and not flash:  # one row of them all, in which a mask keeps them apart
        rows, length = 1, rows * length
    return {
        "rows": rows,
        "length": length,
        "attention": attention,
        "padded": not flash and (flat or (rows > 1 and not full)),
        "reference": has_reference(config),
    }


def check_known(args: TrainingArguments) -> None:
    """Refuse a way of checkpointing whose cost is not known.

    Raises:
        HFTError: it is such a way.
    """
    kwargs = args.activation_checkpointing_kwargs or {}
    if named := [key for key in ("use_reentrant", "selective", "offload") if kwargs.get(key)]:
        raise HFTError(f"FLOPs and activations with {named[0]} checkpointing are not known")


def candidates_of(
    config: Config,
    model_config: PretrainedConfig,
    selection: Selection,
    args: TrainingArguments,
    engine: Engine,
    checkpointed: tuple[int, ...],
) -> list[Candidate]:
    """Full fine-tuning, the run itself, and its cheapest rival: the lower half of the layers and both ends frozen.

    Raises:
        HFTError: the costs are not known.
    """
    method = config.method
    if method.adapter:
        raise HFTError(
            "FLOPs and activations of an adapter are not known; the forward pass and the gradients of activations are "
            "those of full fine-tuning, the gradients of weights those of what the adapter trains"
        )
    if method.schedule:
        raise HFTError(
            f"FLOPs and activations under schedule {method.schedule.name} are not known, since what trains changes"
        )
    if checkpointed:
        check_known(args)
    anatomy = selection.anatomy

    def candidate(name: str, chosen: Selection, how_it_trains: Method) -> Candidate:
        @functools.cache
        def costs(layers: tuple[int, ...], rows: int | None = None) -> StepCosts:
            how = micro_batch(config, args, rows)
            return costs_of(model_config, chosen, checkpointed=layers, precision=engine.precision, **how)

        memory = engine.memory(how_it_trains, chosen, reference=has_reference(config), costs=costs(checkpointed))
        return Candidate(
            name, memory, lambda layers, rows=None: costs(tuple(layers), rows), checkpointed, anatomy.num_layers
        )

    everything, rival = select(anatomy, SelectionConfig(policy="all")), upper_half(anatomy)
    own = candidate(config.values.get("method") or "hft", selection, method)
    fft = candidate("fft", everything, Method(everything.config))
    rest = candidate("upper half", rival, Method(rival.config))
    is_fft = selection.config.policy == "all" and not selection.config.freeze_embeddings
    is_fft = is_fft and not (method.update or method.strategy)
    return [fft, rest] if is_fft else [fft, own, rest]


def upper_half(anatomy: Anatomy) -> Selection:
    """The upper half of the layers and the last norm train: the cheapest half, since the backward pass ends early."""
    units = [unit for unit in anatomy.units if unit.layer >= anatomy.num_layers // 2]
    lower = sorted({f"*.{unit.layer}.*" for unit in anatomy.units} - {f"*.{unit.layer}.*" for unit in units})
    config = SelectionConfig(policy="explicit", freeze=lower or ["*"], freeze_embeddings=True)
    return build_selection(anatomy, config, units)
