"""Ways of training a model beside each other: full fine-tuning, the run, and the cheapest half."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError
from hft.methods import Method
from hft.methods.strategy import ExtraRows
from hft.planning.costs import StepCosts, costs_of, fewest_checkpointed_layers
from hft.planning.engine import Engine, micro_batch
from hft.planning.memory import GIB, Memory, memory_of
from hft.runs.arguments import checkpointed_of
from hft.selection import Selection, SelectionConfig
from hft.selection.policies import select

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

    from hft.runs.config import Config


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
        """The layers whose activations the recipe checkpoints."""
        return checkpointed_of(self.config, self.settings, self.args, self.selection)

    @property
    def layers(self) -> int:
        return self.selection.anatomy.num_layers

    @property
    def state(self) -> Memory:
        """Bytes before activations."""
        reference = self.config.objective.has_reference(self.config.values)
        return memory_of(self.method, self.selection, self.engine, reference=reference)

    @functools.cached_property
    def memory(self) -> Memory:
        """Bytes with activations."""
        reference = self.config.objective.has_reference(self.config.values)
        return memory_of(self.method, self.selection, self.engine, reference=reference, costs=self.step)

    @property
    def step(self) -> StepCosts:
        """A micro-batch as the recipe has it."""
        return self.costs(self.checkpointed)

    @functools.cached_property
    def costs(self) -> Callable[..., StepCosts]:
        """Of a micro-batch, given the layers that are checkpointed and, if they are not the recipe's, its examples."""
        method, strategy = self.method, self.method.strategy
        if method.adapter:
            raise HFTError(
                "FLOPs and activations of an adapter are not known; the forward pass and the gradients of activations "
                "are those of full fine-tuning, the gradients of weights those of what the adapter trains"
            )
        if method.schedule:
            raise HFTError(
                f"FLOPs and activations under schedule {method.schedule.name} are not known, since what trains changes"
            )

        @functools.cache
        def costs(layers: range, examples: int | None = None) -> StepCosts:
            batch = micro_batch(self.config, self.args, examples)
            how = {"precision": self.engine.precision, "attention": batch.attention, "padded": batch.padded}
            rows = (self.model_config, self.selection, batch.rows, batch.length)
            step = costs_of(*rows, checkpointed=layers, **how)
            step = replace(step, reference=step.forward * batch.forward_rows * self.args.max_length // step.tokens)
            extra = strategy.extra_rows() if strategy else ExtraRows()
            return self.with_extra(step, extra, layers, examples) if extra.per_step else step

        return costs

    def room(self, available: float) -> float:
        """Bytes that are left for a micro-batch on a device of so many bytes."""
        return available - self.memory.state - self.memory.gathered

    def fewest(self, available: float) -> int | None:
        """The fewest layers that must be checkpointed to fit into a device of so many bytes; None if it never fits."""
        return fewest_checkpointed_layers(self.costs, self.layers, self.room(available))

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

    def with_extra(self, step: StepCosts, extra: ExtraRows, layers: range, examples: int | None) -> StepCosts:
        """A micro-batch with its share of a strategy's rows, whose logits are the model's own, not TRL's tiles."""
        args, length = self.args, extra.length or self.args.max_length
        usual = args.per_device_train_batch_size
        rows = min(examples or usual, math.ceil(extra.per_step / self.engine.processes))
        how = {"checkpointed": layers, "precision": self.engine.precision, "padded": True, "fused_head": False}
        more = costs_of(self.model_config, self.selection, rows, length, **how)
        flops = more.flops + (more.forward if extra.reference else 0)
        batches = usual * args.gradient_accumulation_steps * self.engine.processes / (examples or usual)
        # A token's logits as the model has them and in fp32, their logarithm, and the gradients of all three; of a
        # reference the first three.
        wide = 2 if self.engine.precision.autocast else self.engine.precision.trained.itemsize
        per_word = 2 * (wide + 4) + 4 + (wide + 8 if extra.reference else 0)
        logits = rows * (length - 1) * self.model_config.get_text_config().vocab_size * per_word
        share = flops * extra.per_step / rows / batches
        sampling = more.forward * extra.sampled // rows
        return replace(step, strategy=round(share), sampling=sampling, strategy_peak=more.peak + logits)

    def rivals(self) -> list[Candidate]:
        """Full fine-tuning, the run unless it is that, and the cheapest half; refuses a run of unknown costs."""
        method, chosen, anatomy = self.method, self.selection.config, self.selection.anatomy
        others = {"fft": SelectionConfig(policy="all")}
        others["upper half"] = SelectionConfig(policy="bottom", freeze_embeddings=True)
        fft, half = (
            replace(self, name=name, method=Method(config), selection=select(anatomy, config))
            for name, config in others.items()
        )
        is_fft = chosen.policy == "all" and not (chosen.freeze_embeddings or method.update or method.strategy)
        self.costs(self.checkpointed)
        return [fft, half] if is_fft else [fft, self, half]
