"""Whether a run fits into this machine: the one question that a run asks planning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hft.errors import DoesNotFit, HFTError
from hft.machine import device_bytes
from hft.planning.candidates import Candidate
from hft.planning.engine import MOMENTS, Engine, engine_of
from hft.planning.memory import GIB

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

    from hft.runs.config import Config
    from hft.selection import Selection

# Above this many parameters a run on a CPU is a mistake unless it was asked for by name.
CPU_MODEL_SIZE = 1_000_000_000
# Fraction of a device that is left free, for what is not counted: CUDA's context, workspaces, fragments.
SPARE = 0.05


def fit(config: Config, model_config: PretrainedConfig, selection: Selection, args: TrainingArguments) -> int | None:
    """Refuse a run whose state this machine cannot hold; for `activation_checkpointing_layers: auto`, the fewest."""
    engine = engine_of(config, model_config)
    run = Candidate("the run", config, model_config, config.method, selection, args, engine, {})
    if sentence := why_state_does_not_fit(run):
        raise DoesNotFit(f"{sentence}; hft plan --gpus 8 --gpu_memory 80GiB forecasts other machines")
    if config.run.activation_checkpointing_layers != "auto":
        return None
    return fewest_layers(run, device_bytes(use_cpu=not engine.on_gpu) * (1 - SPARE))


def fewest_layers(run: Candidate, available: float) -> int:
    """The fewest layers that must be checkpointed to fit a run into so many bytes of a device."""
    try:
        fewest = run.fewest(available)
    except HFTError as error:
        raise HFTError(f"activation_checkpointing_layers auto: {error}; give a number of layers") from error
    if fewest is None:
        raise DoesNotFit(run.remedy(available))
    return fewest


def why_state_does_not_fit(run: Candidate) -> str | None:
    """A sentence if this machine cannot hold a run's weights, gradients and optimizer state, else None."""
    values, numel = run.config.values, run.selection.anatomy.numel
    # An optimizer whose state is not known counts as if it had none.
    engine = replace(run.engine, moments_bytes=MOMENTS.get(values.get("optim") or "adamw_torch", 0))

    def needed(engine: Engine) -> float:
        return replace(run, engine=engine).state.total / GIB

    size = f"{numel / 1e9:.1f}B parameters"
    if not engine.on_gpu and numel > CPU_MODEL_SIZE and not values.get("use_cpu"):
        one, eight = (replace(engine, processes=n, shards=n, frozen_bytes=2) for n in (1, 8))
        sharded = f", {needed(eight):.1f} GiB each on 8" if run.method.shardable else ""
        return (
            f"{size} need a GPU and this machine has none: {needed(one):.1f} GiB before activations on one{sharded} "
            "(--use_cpu true if you mean the CPU)"
        )
    need, have = needed(engine), device_bytes(use_cpu=not engine.on_gpu) / GIB
    if need <= have:
        return None
    more = "; shard it over more GPUs with FSDP2" if engine.on_gpu and run.method.shardable else ""
    device = "each device" if engine.on_gpu else "this machine"
    return f"{size} need {need:.1f} GiB per device before activations; {device} has {have:.1f} GiB{more}"
