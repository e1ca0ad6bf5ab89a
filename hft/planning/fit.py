"""Whether a run fits into this machine: the one question that a run asks planning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hft.errors import DoesNotFit, HFTError
from hft.machine import device_bytes
from hft.planning.candidates import Setup
from hft.planning.engine import MOMENTS, Engine, engine_of
from hft.planning.memory import GIB, memory_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

    from hft.runs.config import Config
    from hft.selection import Selection

# Above this many parameters a run on a CPU is a mistake unless it was asked for by name.
CPU_MODEL_SIZE = 1_000_000_000
# Fraction of a device that is left free, for what is not counted: CUDA's context, workspaces, fragments.
SPARE = 0.05


def fit(
    config: Config,
    model_config: PretrainedConfig,
    selection: Selection,
    args: TrainingArguments,
) -> int | None:
    """Check that this machine holds a run's state, and for `activation_checkpointing_layers: auto` the whole run.

    Returns:
        For `auto` the fewest layers whose checkpointing makes it fit.

    Raises:
        DoesNotFit: it does not.
    """
    engine = engine_of(config, model_config)
    if sentence := why_state_does_not_fit(config, selection, engine):
        raise DoesNotFit(f"{sentence}; hft plan --gpus 8 --gpu_memory 80GiB forecasts other machines")
    if config.run.activation_checkpointing_layers != "auto":
        return None
    setup = Setup(config, model_config, args, engine, range(selection.anatomy.num_layers))
    return fewest_layers(setup, selection, device_bytes(use_cpu=not engine.on_gpu) * (1 - SPARE))


def fewest_layers(setup: Setup, selection: Selection, available: float) -> int:
    """The fewest layers that must be checkpointed to fit a run into so many bytes of a device."""
    try:
        run = setup.candidate("the run", setup.config.method, selection)
    except HFTError as error:
        raise HFTError(f"activation_checkpointing_layers auto: {error}; give a number of layers") from error
    fewest = run.fewest(available)
    if fewest is None:
        raise DoesNotFit(run.remedy(available, setup.config, setup.args, setup.engine.shards))
    return fewest


def why_state_does_not_fit(config: Config, selection: Selection, engine: Engine) -> str | None:
    """A sentence if this machine cannot hold a run's weights, gradients and optimizer state, else None."""
    method, use_cpu = config.method, config.values.get("use_cpu")
    reference = config.objective.has_reference(config.values)
    # An optimizer whose state is not known counts as if it had none.
    engine = replace(engine, moments_bytes=MOMENTS.get(config.values.get("optim") or "adamw_torch", 0))

    def needed(engine: Engine) -> float:
        return memory_of(method, selection, engine, reference=reference).total / GIB

    size = f"{selection.anatomy.numel / 1e9:.1f}B parameters"
    if not engine.on_gpu and selection.anatomy.numel > CPU_MODEL_SIZE and not use_cpu:
        one, eight = (replace(engine, processes=n, shards=n, frozen_bytes=2) for n in (1, 8))
        sharded = f", {needed(eight):.1f} GiB each on 8" if method.shardable else ""
        return (
            f"{size} need a GPU and this machine has none: {needed(one):.1f} GiB before activations on one{sharded} "
            "(--use_cpu true if you mean the CPU)"
        )
    need, have = needed(engine), device_bytes(use_cpu=not engine.on_gpu) / GIB
    if need <= have:
        return None
    more = "; shard it over more GPUs with FSDP2" if engine.on_gpu and method.shardable else ""
    device = "each device" if engine.on_gpu else "this machine"
    return f"{size} need {need:.1f} GiB per device before activations; {device} has {have:.1f} GiB{more}"
