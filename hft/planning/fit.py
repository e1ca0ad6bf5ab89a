"""A way of training a model: what it takes, and whether it fits, which is the one question that a run asks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig, TrainingArguments

from hft.errors import DoesNotFit, HFTError
from hft.machine import device_bytes
from hft.methods import Method
from hft.methods.strategy import ExtraRows
from hft.planning.costs import StepCosts, costs_of, fewest_checkpointed_layers
from hft.planning.memory import GIB, MOMENTS, Engine, Memory, engine_of, memory_of, micro_batch
from hft.runs.arguments import checkpointed_of
from hft.runs.config import Config
from hft.selection import Selection, SelectionConfig
from hft.selection.policies import select

# Above this many parameters a run on a CPU is a mistake unless it was asked for by name.
CPU_MODEL_SIZE = 1_000_000_000
# Fraction of a device that is left free, for what is not counted: CUDA's context, workspaces, fragments.
SPARE = 0.05


@dataclass(frozen=True)
class Candidate:
    """One way of training a model, planned from shapes alone, on a device of this machine or of others."""

    name: str  # of the method
    config: Config  # of the run
    model_config: PretrainedConfig  # the base's
    method: Method
    selection: Selection  # what trains
    args: TrainingArguments  # TRL's config
    engine: Engine  # where it computes
    settings: dict[str, Any]  # that this machine decides

    @property
    def checkpointed(self) -> range:
        return checkpointed_of(self.config, self.settings, self.args, self.selection)

    @property
    def layers(self) -> int:
        return self.selection.anatomy.num_layers

    @property
    def state(self) -> Memory:
        """Bytes before activations."""
        return self._memory()

    @functools.cached_property
    def memory(self) -> Memory:
        """Bytes with activations."""
        return self._memory(self.step)

    def _memory(self, costs: StepCosts | None = None) -> Memory:
        reference = self.config.objective.has_reference(self.config.values)
        return memory_of(self.method, self.selection, self.engine, reference=reference, costs=costs)

    @functools.cached_property
    def step(self) -> StepCosts:
        """A micro-batch as the recipe has it."""
        return self.costs(self.checkpointed)

    def costs(self, checkpointed: range, examples: int | None = None) -> StepCosts:
        """A micro-batch with other layers checkpointed, and with so many examples if they are not the recipe's."""
        if self.method.adapter:
            raise HFTError("FLOPs and activations of an adapter are not known")
        if self.method.schedule:
            raise HFTError(f"FLOPs and activations under schedule {self.method.schedule.name} are not known")
        (batch, forward_rows), args = micro_batch(self.config, self.args, examples), self.args
        how = {"checkpointed": checkpointed, "precision": self.engine.precision}
        step = costs_of(self.model_config, self.selection, **batch, **how)
        reference = step.forward * forward_rows * args.max_length // step.tokens
        extra = self.method.strategy.extra_rows() if self.method.strategy else ExtraRows()
        if not extra.per_step:
            return replace(step, reference=reference)
        # A micro-batch's share of a strategy's rows, whose logits are the model's own, not TRL's tiles.
        length, usual = extra.length or args.max_length, args.per_device_train_batch_size
        rows = min(examples or usual, math.ceil(extra.per_step / self.engine.processes))
        more = costs_of(self.model_config, self.selection, rows, length, padded=True, fused_head=False, **how)
        flops = more.flops + (more.forward if extra.reference else 0)
        batches = usual * args.gradient_accumulation_steps * self.engine.processes / (examples or usual)
        # A token's logits as the model has them and in fp32, their logarithm, and the gradients of all three; of a
        # reference the first three.
        wide = 2 if self.engine.precision.autocast else self.engine.precision.trained.itemsize
        per_word = 2 * (wide + 4) + 4 + (wide + 8 if extra.reference else 0)
        logits = rows * (length - 1) * self.model_config.get_text_config().vocab_size * per_word
        return replace(
            step,
            reference=reference,
            strategy=round(flops * extra.per_step / rows / batches),
            sampling=more.forward * extra.sampled // rows,
            peaks=step.peaks | {"the rows of the strategy: all their logits": more.peak + logits - step.saved},
        )

    def room(self, available: float) -> float:
        """Bytes that are left for a micro-batch on a device of so many bytes."""
        return available - self.memory.state - self.memory.gathered

    def fewest(self, available: float) -> int | None:
        """The fewest layers that must be checkpointed to fit into a device of so many bytes; None if it never fits."""
        try:
            return fewest_checkpointed_layers(self.costs, self.layers, self.room(available))
        except HFTError as error:
            raise HFTError(f"activation_checkpointing_layers auto: {error}; give a number of layers") from error

    def remedy(self, available: float) -> str | None:
        """What makes the run fit into so many bytes of a device, as a sentence; None if it fits."""
        memory, args = self.memory, self.args
        rows = args.per_device_train_batch_size
        if memory.total <= available:
            return None
        short = f"short by {(memory.total - available) / GIB:.1f} GiB"
        if (fewest := self.fewest(available)) is not None:
            return f"{short}: fits with --activation_checkpointing_layers {fewest} (of {self.layers})"
        room, every = self.room(available), range(self.layers)
        divisors = [n for n in range(rows - 1, 0, -1) if not rows * args.gradient_accumulation_steps % n]
        if fewer := next((n for n in divisors if self.costs(every, n).peak <= room), None):
            checkpointed = "" if len(self.checkpointed) == self.layers else ", with all layers checkpointed"
            return f"{short}: lower --per_device_train_batch_size from {rows} to {fewer}{checkpointed}"
        if self.costs(every, 1).transient < room:
            return f"{short}, and one row with all layers checkpointed is too long: lower --max_length"
        if not self.method.shardable:
            return f"{short}, and this method cannot be sharded: use GPUs with more memory, or a smaller model"
        more = "shard it over more GPUs" if self.engine.shards > 1 else "shard it over several GPUs with FSDP2"
        return f"{short}, {memory.state / GIB:.1f} GiB of it state: {more}"

    def rivals(self) -> list[Candidate]:
        """Full fine-tuning, the run unless it is that, and the cheapest half; refuses a run of unknown costs."""
        method, chosen, anatomy = self.method, self.selection.config, self.selection.anatomy
        others = {"fft": SelectionConfig(policy="all")}
        others |= {"upper half": SelectionConfig(policy="bottom", freeze_embeddings=True)}
        fft, half = (replace(self, name=n, method=Method(c), selection=select(anatomy, c)) for n, c in others.items())
        is_fft = chosen.policy == "all" and not (chosen.freeze_embeddings or method.update or method.strategy)
        _ = self.step  # refuses
        return [fft, half] if is_fft else [fft, self, half]


def fit(config: Config, model_config: PretrainedConfig, selection: Selection, args: TrainingArguments) -> int | None:
    """Refuse a run whose state this machine cannot hold; for `activation_checkpointing_layers: auto`, the fewest."""
    engine = engine_of(config, model_config)
    run = Candidate("the run", config, model_config, config.method, selection, args, engine, {})
    if sentence := why_state_does_not_fit(run):
        raise DoesNotFit(f"{sentence}; hft plan --gpus 8 --gpu_memory 80GiB forecasts other machines")
    if config.run.activation_checkpointing_layers != "auto":
        return None
    available = device_bytes(use_cpu=not engine.on_gpu) * (1 - SPARE)
    if (fewest := run.fewest(available)) is None:
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
