"""Ways of training a model beside each other: full fine-tuning, the run, and the cheapest half."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hft.errors import HFTError
from hft.methods import Method
from hft.methods.strategy import ExtraRows
from hft.planning.costs import StepCosts, costs_of, fewest_checkpointed_layers
from hft.planning.engine import Engine, micro_batch
from hft.planning.memory import GIB, Memory, memory_of
from hft.selection import Selection, SelectionConfig
from hft.selection.policies import select

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

    from hft.runs.config import Config


@dataclass(frozen=True)
class Candidate:
    """One way of training, on one device."""

    name: str  # of the method
    memory: Memory  # per device, with activations
    # of a micro-batch, given the layers that are checkpointed and, if they are not the recipe's, its examples
    costs: Callable[..., StepCosts]
    checkpointed: range  # those that the recipe checkpoints
    layers: int  # number of layers

    @property
    def step(self) -> StepCosts:
        """A micro-batch as the recipe has it."""
        return self.costs(self.checkpointed)

    def room(self, available: float) -> float:
        """Bytes that are left for a micro-batch on a device of so many bytes."""
        return available - self.memory.state - self.memory.gathered

    def fewest(self, available: float) -> int | None:
        """The fewest layers that must be checkpointed to fit into a device of so many bytes; None if it never fits."""
        return fewest_checkpointed_layers(self.costs, self.layers, self.room(available))

    def remedy(self, available: float, config: Config, args: TrainingArguments, shards: int) -> str | None:
        """What makes the run fit into so many bytes of a device, as a sentence; None if it fits."""
        memory, rows = self.memory, args.per_device_train_batch_size
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
        if not config.method.shardable:
            return f"{short}, and this method cannot be sharded: use GPUs with more memory, or a smaller model"
        more = "shard it over more GPUs" if shards > 1 else "shard it over several GPUs with FSDP2"
        return f"{short}, {memory.state / GIB:.1f} GiB of it state: {more}"


@dataclass(frozen=True)
class Setup:
    """What every way of training a model has in common: its rows, its batch, and where it computes."""

    config: Config  # of the run
    model_config: PretrainedConfig  # the base's
    args: TrainingArguments  # TRL's config
    engine: Engine  # where it computes
    checkpointed: range  # the layers whose activations are checkpointed

    def candidate(self, name: str, method: Method, selection: Selection) -> Candidate:
        """One way of training."""
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
            step = costs_of(
                self.model_config,
                selection,
                batch.rows,
                batch.length,
                checkpointed=layers,
                precision=self.engine.precision,
                attention=batch.attention,
                padded=batch.padded,
            )
            step = replace(step, reference=step.forward * batch.forward_rows * self.args.max_length // step.tokens)
            extra = method.strategy.extra_rows() if method.strategy else ExtraRows()
            return self.with_extra(step, extra, selection, layers, examples) if extra.per_step else step

        reference = self.config.objective.has_reference(self.config.values)
        memory = memory_of(method, selection, self.engine, reference=reference, costs=costs(self.checkpointed))
        return Candidate(name, memory, costs, self.checkpointed, selection.anatomy.num_layers)

    def with_extra(
        self, step: StepCosts, extra: ExtraRows, selection: Selection, layers: range, examples: int | None
    ) -> StepCosts:
        """A micro-batch with its share of a strategy's rows, whose logits are the model's own, not TRL's tiles."""
        args, length = self.args, extra.length or self.args.max_length
        usual = args.per_device_train_batch_size
        rows = min(examples or usual, math.ceil(extra.per_step / self.engine.processes))
        how = {"checkpointed": layers, "precision": self.engine.precision, "padded": True, "fused_head": False}
        more = costs_of(self.model_config, selection, rows, length, **how)
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

    def rivals(self, selection: Selection) -> list[Candidate]:
        """Full fine-tuning, the run unless it is that, and the cheapest half."""
        method = self.config.method
        run = self.candidate(self.config.values.get("method") or "hft", method, selection)
        everything, half = (
            select(selection.anatomy, SelectionConfig(policy=policy, freeze_embeddings=policy == "bottom"))
            for policy in ("all", "bottom")
        )
        fft = self.candidate("fft", Method(everything.config), everything)
        rest = self.candidate("upper half", Method(half.config), half)
        is_fft = selection.config.policy == "all" and not selection.config.freeze_embeddings
        return [fft, rest] if is_fft and not (method.update or method.strategy) else [fft, run, rest]
