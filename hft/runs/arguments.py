"""TRL's config of a run: batch, learning rate and template as ours say, and what the machine decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hft.config import fill
from hft.errors import HFTError
from hft.machine import cpu_has_bfloat16, is_zero3, world_size
from hft.runs.config import Config, find_template
from hft.training.checkpointing import checkpointed_layers

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from hft.selection import Selection


def trainer_class(config: Config) -> type[Trainer]:
    """TRL's trainer of a run's objective, half fine-tuned or with an adapter."""
    from hft import training

    trainer = config.objective.trainer
    return training.with_adapter(trainer) if config.method.adapter else training.half(trainer)


def machine_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that the machine decides where the config does not: CPU or not, bf16 or not."""
    import torch

    on_cpu = values.get("use_cpu") or not torch.accelerator.is_available()
    settings = {"use_cpu": True, "bf16": cpu_has_bfloat16() and not values.get("fp16")} if on_cpu else {}
    if is_zero3():  # DeepSpeed itself calls torch's autocast; with bf16 it would convert the frozen half
        settings["bf16"] = False
    return {key: value for key, value in settings.items() if values.get(key) is None}


def training_arguments(
    config: Config, machine: dict[str, Any], processes: int | None = None
) -> tuple[TrainingArguments, list[str]]:
    cls, values, method = config.objective.config, dict(config.values), config.method
    batch = accumulation_steps(values, cls.per_device_train_batch_size, processes or world_size())
    rate, notes = learning_rate(values, cls.learning_rate)
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        notes.append(f"max_steps {values['max_steps']} overrides num_train_epochs {values['num_train_epochs']:g}")
    if values.get("chat_template_path"):
        values["chat_template_path"] = find_template(values["chat_template_path"])
    if (layers := values.get("activation_checkpointing_layers")) is not None:
        values["activation_checkpointing"] = layers == "auto" or layers > 0
    args = fill(cls, values | machine | batch | rate)
    if args.n_gpu > 1:  # Trainer would wrap the model in DataParallel and multiply the batch
        raise HFTError("several GPUs are visible to one process: add --num_processes, or set CUDA_VISIBLE_DEVICES=0")
    if method.adapter and config.run.save_only_trained:
        raise HFTError("an adapter's folder holds only what trained anyway; leave out save_only_trained")
    trainer_class(config).check(args, *method.parts)
    return args, notes


def checkpointed_of(config: Config, machine: dict[str, Any], args: TrainingArguments, selection: Selection) -> range:
    count, first = selection.anatomy.num_layers, config.run.activation_checkpointing_layers
    first = machine.get("activation_checkpointing_layers", count) if first == "auto" else first
    layers = checkpointed_layers(args, count, first)
    adapter = config.method.adapter
    return range(0) if adapter and not adapter.keeps_checkpointing else layers


def accumulation_steps(values: dict[str, Any], default: int, processes: int) -> dict[str, int]:
    """Gradient accumulation that makes the global batch what the recipe says; `default` rows per device."""
    total = values.get("global_batch_size")
    if total is None:
        return {}
    if "gradient_accumulation_steps" in values:
        raise HFTError("gradient_accumulation_steps is derived from global_batch_size; give only one of them")
    per_device = values.get("per_device_train_batch_size", default)
    if per_device < 1 or total < 1:
        raise HFTError(f"batch sizes must be at least 1, got {per_device} rows per device, {total} in all")
    accumulation, remainder = divmod(total, per_device * processes)
    if remainder or not accumulation:
        raise HFTError(
            f"global_batch_size {total} is not a multiple of {per_device} rows per device x {processes} processes; "
            "change --per_device_train_batch_size"
        )
    return {"gradient_accumulation_steps": accumulation}


def learning_rate(values: dict[str, Any], default: float) -> tuple[dict[str, float], list[str]]:
    """The learning rate of an adapter, whose method file gives it as a multiple of the recipe's; and a note."""
    factor, rate = values.get("learning_rate_factor", 1.0), values.get("learning_rate", default)
    if factor == 1.0:
        return {}, []
    return {"learning_rate": rate * factor}, [
        f"learning rate {rate * factor:g}: {factor:g} times the recipe's {rate:g}"
    ]
