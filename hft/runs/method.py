"""How parameters change in a run: which of them train, how they move and when that changes; or an adapter instead."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from hft.config import RunConfig, fill
from hft.data import load_split
from hft.errors import HFTError
from hft.machine import indented, is_main, is_sharded, say, world_size
from hft.methods.adapter import AdapterConfig, adapter_selection
from hft.methods.callback import prepare
from hft.methods.schedule import ScheduleConfig, check_schedule, peak_numel
from hft.methods.updates import UpdateConfig
from hft.model.anatomy import anatomy_of, meta_model
from hft.planning.memory import GIB, check_fits, reset_peak_memory, static_memory
from hft.record.manifest import Manifest
from hft.selection import Selection, SelectionConfig
from hft.selection.importance import check_linear, select_by_importance, selection_from_masks, text_batches
from hft.selection.masks import load_masks, save_masks
from hft.selection.policies import DEFERRED, describe_difference, placeholder_selection, select
from hft.training.adapters import check_possible
from hft.training.dpo import check_reference
from hft.training.mixin import load_base

CONFIGS = (SelectionConfig, ScheduleConfig, UpdateConfig, AdapterConfig)

# What a method file says, all of it: a later file takes none of an earlier one's over. Seed and round are the run's.
KEYS = frozenset(f.name for cls in CONFIGS for f in fields(cls)) - {"selection_seed", "round"}


@dataclass(frozen=True)
class Method:
    """How parameters change, as far as it is known before the base is loaded.

    Attributes:
        selection: what trains, or a stand-in of its size (`hft.selection.policies.placeholder_selection`).
        update: how the trained weights move.
        schedule: how the selection changes while the run goes on.
    """

    selection: Selection
    update: UpdateConfig
    schedule: ScheduleConfig

    @property
    def adapter(self) -> AdapterConfig | None:
        """The adapter that trains instead of the model's own weights."""
        return self.selection.config if isinstance(self.selection.config, AdapterConfig) else None

    @property
    def is_deferred(self) -> bool:
        """Whether the selection is a stand-in yet."""
        return not self.adapter and self.selection.config.policy in DEFERRED

    def check(self, args: TrainingArguments, *, pairs: bool) -> None:
        """Refuse settings of the trainer that the method cannot do with.

        Raises:
            HFTError: there are some.
        """
        self.update.check(args)
        if self.adapter:
            check_possible(self.adapter, args, pairs=pairs)
        if self.schedule.schedule != "none":
            prepare(args)
        if pairs and not self.adapter:
            check_reference(args)

    def for_trainer(self) -> dict[str, Any]:
        """The arguments that a trainer takes of it."""
        if self.adapter:
            return {"adapter": self.adapter}
        return {"selection": self.selection, "update": self.update, "schedule": self.schedule}


def method_of(model_config: PretrainedConfig, config: dict[str, Any]) -> Method:
    """The method that a resolved config describes.

    Raises:
        HFTError: keys that do not go together, or a selection that cannot be made.
    """
    adapter = fill(AdapterConfig, config)
    if adapter.adapter:
        selection = adapter_selection(model_config, adapter)
    else:
        model = meta_model(model_config)
        selection = placeholder_selection(anatomy_of(model), fill(SelectionConfig, config))
        if config.get("policy") == "importance" or config.get("update") == "mixout":
            check_linear(model, selection.anatomy)
    method = Method(selection, fill(UpdateConfig, config), fill(ScheduleConfig, config))
    check_schedule(selection, method.schedule)
    if config.get("policy") == "importance" and not (config.get("importance_data") and config.get("importance_rows")):
        raise HFTError(
            "the importance policy scores the base on general text: give --importance_data, --importance_rows"
        )
    return method


def check_memory(method: Method, config: dict[str, Any], *, pairs: bool) -> str:
    """What weights, gradients, optimizer state and the method's own copies will take.

    Returns:
        A line for people.

    Raises:
        HFTError: this machine does not have it.
    """
    shards = world_size() if is_sharded() or config.get("fsdp") else 1
    # DDP keeps all gradients a second time, in the buckets that it sends.
    buckets = 4 * method.selection.num_with_optimizer_state if world_size() > shards else 0
    needs = {
        "shards": shards,
        "reference": pairs and not config.get("precompute_ref_log_probs"),
        "peak": peak_numel(method.selection, method.schedule),
        "more": method.update.memory(method.selection) + buckets,
    }
    check_fits(method.selection, cpu_asked_for=bool(config.get("use_cpu")), **needs)
    return f"{static_memory(method.selection, **needs) / GIB:.2f} GiB a device before activations"


def chosen(
    plan: Selection,
    run_config: RunConfig,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: str | None,
) -> Selection:
    """The selection that `placeholder_selection` stood in for.

    That of the importance policy is made by the first process, and taken over by the others and by a resume.

    Raises:
        HFTError: there is no text to score on, or the checkpoint was trained with another selection.
    """
    out, made = Path(args.output_dir), None
    if checkpoint:
        manifest = Manifest.load(checkpoint)
        if "adapter" in manifest.selection:
            raise HFTError(f"cannot resume from {checkpoint}: it trained an adapter; choose another --output_dir")
        if difference := describe_difference(plan.config, SelectionConfig(**manifest.selection)):
            raise HFTError(f"cannot resume from {checkpoint}: it was trained with another selection ({difference})")
        return selection_from_masks(
            plan.anatomy, plan.config, manifest.trained_units, load_masks(checkpoint) if manifest.masks else {}
        )
    if plan.config.policy == "random-element":
        return select(plan.anatomy, plan.config)
    if is_main():
        model, _ = load_base(run_config.model_name_or_path, args)
        rows = load_split(plan.config.importance_data, "train")
        batches = list(text_batches(tokenizer, rows, args.max_length, plan.config.importance_rows))
        made = select_by_importance(model.to(args.device), plan.anatomy, plan.config, batches)
        del model
        reset_peak_memory()
        save_masks(out, made.frozen_masks)
    [trained] = broadcast_object_list([sorted(made.trained_units) if made else None])
    say(
        "selection",
        indented(f"{plan.config.score} on {plan.config.importance_rows} rows of {plan.config.importance_data}"),
    )
    return made or selection_from_masks(
        plan.anatomy, plan.config, trained, load_masks(out) if plan.frozen_masks else {}
    )
