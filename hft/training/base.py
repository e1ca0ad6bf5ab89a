"""What every trainer here does with its manifest: check a checkpoint against it, write the card; and log memory."""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from hft.errors import HFTError, shorten
from hft.freezing import whole
from hft.machine import peak_memory
from hft.methods import check_parts, steps_elsewhere
from hft.methods.callback import ScheduleCallback
from hft.methods.part import MethodPart
from hft.record.card import changed_arguments, write_card
from hft.record.checkpoints import TRAINER_STATE, last_checkpoint
from hft.record.manifest import MANIFEST_NAME, Manifest
from hft.training.reference import has_reference

# Of `activation_checkpointing_kwargs`: transformers' own keys, and torch's.
CHECKPOINTING = ["every_n_layers", "offload", "preserve_rng_state"]
CHECKPOINTING += [key for key in inspect.signature(checkpoint).parameters if key not in ("function", "args", "kwargs")]


class ManifestMixin:
    """Mixin of a TRL trainer with a `manifest` of what trains, and the `schedule` that changes it, if there is one."""

    manifest: Manifest
    schedule: ScheduleCallback | None = None
    act_last: Sequence[TrainerCallback] = ()  # after those added since, such as a projection of gradients
    resumed_from: str | None = None
    resolved_config: Mapping[str, Any] | None = None  # where a command made the trainer

    @classmethod
    def check(cls, args: TrainingArguments, *parts: MethodPart | None) -> None:
        """Refuse settings that cannot work, before anything is loaded; the parts are those of the run's method."""
        check_parts(args, *parts, has_reference=has_reference(args))
        check_checkpointing(args, selective=isinstance(args, SFTConfig))
        check_batch(args)
        if getattr(args, "sync_ref_model", False):  # TRL would update it in place
            raise HFTError("sync_ref_model would move the frozen half, which policy and reference share; remove it")

    def manifest_so_far(self) -> Manifest:
        if self.schedule is None:
            return self.manifest
        return replace(self.manifest, schedule=self.manifest.schedule | self.schedule.record(self._steps_of_weights()))

    def _steps_of_weights(self) -> int:
        """Steps that the weights in the model have taken: those of the best checkpoint once it has been loaded."""
        state = self.state
        is_best = self.args.load_best_model_at_end and not self.is_in_train and state.best_model_checkpoint
        return state.best_global_step if is_best else state.global_step

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, from a checkpoint of this selection and base if one is given; `True` takes the last complete one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self.resumed_from = resume_from_checkpoint or None
        if self.resumed_from and self.is_world_process_zero():
            self.check_resumable(self.resumed_from)
        for callback in self.act_last:
            self.remove_callback(callback)
            self.add_callback(callback)
        self.args.eval_on_start = self.args.eval_on_start and not self.resumed_from  # it would not be at the start
        # It would hide what `log` looks for, and wait for the device at every batch.
        self.args.logging_nan_inf_filter = False
        return super().train(resume_from_checkpoint=self.resumed_from, **kwargs)

    def check_resumable(self, checkpoint: str) -> None:
        """Refuse to resume from a checkpoint that is not this run's, or that lacks the state of the optimizer."""
        if steps_elsewhere(self.args) and "schedule_free" not in self.args.optim:
            why = f"{self.args.optim.value} saves no state, so the run would not continue exactly"
            raise HFTError(f"cannot resume from {checkpoint}: {why}; start again with --resume_from_checkpoint none")
        self.manifest.check_resumable(checkpoint)

    def create_accelerator_and_postprocess(self) -> None:
        """Let the precision be what `bf16` and `fp16` say, and not what the launcher's config or environment does."""
        self.args.mixed_precision = "fp16" if self.args.fp16 else "bf16" if self.args.bf16 else "no"
        super().create_accelerator_and_postprocess()

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """Leave no epoch to a run that resumes from its last step, where Trainer would take another."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self.resumed_from:
            state = json.loads((Path(self.resumed_from) / TRAINER_STATE).read_text())
            epochs = 0 if state["global_step"] >= max_steps else epochs
        return (epochs, *others, max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the peak memory so far, and stop a run whose loss or gradient is not finite."""
        logs["peak_memory_gb"] = round(peak_memory() / 1e9, 2)
        super().log(logs, start_time)
        # Under fp16 the scaler skips a step whose gradient is infinite, and continues.
        names = {"loss": "loss"} | ({} if self.args.fp16 else {"grad_norm": "gradient"})
        for key, name in names.items():
            if not math.isfinite(logs.get(key, 0.0)):
                raise diverged(name, logs[key], self.state.global_step, self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a trained weight is not finite: the last good checkpoint stays the last one."""
        if self.optimizer is not None:
            self.optimizer.eval()  # a schedule-free one has other weights to evaluate and to save
        norm = whole(get_total_norm([p.detach() for p in self.model.parameters() if p.requires_grad]))
        if not norm.isfinite():
            raise diverged("norm of the weights", norm.item(), self.state.global_step, self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write hft's model card where TRL would write its draft: before a checkpoint and before a push to the Hub."""
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else tags or []
            self.write_card(self.args.output_dir, [*self._tag_names, *more])

    def write_card(self, folder: str | Path, tags: Sequence[str]) -> None:
        settings = changed_arguments(self.args) if self.resolved_config is None else self.resolved_config
        saved = not self.is_in_train and (Path(folder) / MANIFEST_NAME).exists()
        manifest = Manifest.load(folder) if saved else self.manifest_so_far()
        write_card(folder, manifest, settings, tags, model_id=self.hub_model_id)


def check_checkpointing(args: TrainingArguments, *, selective: bool) -> None:
    """Refuse what would only fail in the first step; a `selective` trainer can save attention alone."""
    given = args.activation_checkpointing_kwargs or {}
    known = [*CHECKPOINTING, *(["selective"] if selective else [])]
    if unknown := [key for key in given if key not in known]:
        raise HFTError(f"activation_checkpointing_kwargs has no {unknown[0]!r}; it has {shorten(known, most=9)}")
    every = given.get("every_n_layers", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise HFTError(f"every_n_layers must be an integer of at least 1, got {every!r}")
    if given.get("offload") and not torch.accelerator.is_available():
        raise HFTError("offload moves activations from GPU to CPU memory, and there is no GPU here; remove it")


def check_batch(args: TrainingArguments) -> None:
    """Refuse what would change how many rows there are per step, or leave a process without any at an epoch's end."""
    config = args.accelerator_config
    changes = {
        "accelerator_config's split_batches": config.split_batches,
        "accelerator_config's dispatch_batches": config.dispatch_batches,
        "even_batches: false in accelerator_config": not config.even_batches,
        "accelerator_config's num_steps": (config.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    if found := [name for name, is_set in changes.items() if is_set]:
        batch = "per_device_train_batch_size and gradient_accumulation_steps or the global batch"
        raise HFTError(f"{found[0]} would change the rows per step; remove it, and set {batch}")


def diverged(name: str, value: float, step: int, out: str) -> HFTError:
    last = last_checkpoint(out)
    kept = f"{last} is the last good checkpoint" if last else "no checkpoint was saved"
    return HFTError(
        f"the {name} is {value} at step {step}; {kept}; a resume keeps its learning rates, so train again with a lower "
        "--learning_rate or --max_grad_norm, or more --warmup_steps, and --resume_from_checkpoint none"
    )
