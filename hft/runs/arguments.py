"""TRL's config of a run, and what its settings need, asked before any weights are loaded."""

import re
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from hft import training
from hft.config import fill
from hft.errors import HFTError, reason
from hft.machine import cpu_has_bfloat16, is_zero3, world_size
from hft.model.anatomy import meta_model
from hft.runs.config import Config, find_template
from hft.selection import Selection

# Key, its values, modules of which one is needed, and what pip calls it; trackers and optimizers name theirs.
NEEDED = (
    ("use_liger_kernel", "True", "liger_kernel", "liger-kernel"),
    ("deepspeed", "(?!None).*", "deepspeed", "'half-fine-tuning[deepspeed]'"),
    ("attn_implementation", "flash_attention_[24]", "flash_attn kernels", "flash-attn"),
    ("attn_implementation", "flash_attention_3", "flash_attn_interface kernels", "flash-attn-3"),
    ("attn_implementation", ".+/.+", "kernels", "kernels"),
)
# Key, and the values of another one with which transformers ignores it.
IGNORED = (
    ("lr_scheduler_kwargs", "lr_scheduler_type", "constant|constant_with_warmup"),
    ("optim_args", "optim", "adafactor|(paged_)?(lion|adamw_(8|32|bnb_8)bit).*|adamw_torch(_fused|_xla)?|(ada)?lomo"),
    ("optim_target_modules", "optim", "(?!galore|apollo).*"),
)


def trainer_class(config: Config) -> type[Trainer]:
    trainer = config.objective.trainer
    return training.with_adapter(trainer) if config.method.adapter else training.half(trainer)


def machine_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that the machine decides where the config does not: CPU or not, bf16 or not."""
    on_cpu = values.get("use_cpu") or not torch.accelerator.is_available()
    settings = {"use_cpu": True, "bf16": cpu_has_bfloat16() and not values.get("fp16")} if on_cpu else {}
    if is_zero3():  # DeepSpeed itself calls torch's autocast; with bf16 it would convert the frozen half
        settings["bf16"] = False
    return {key: value for key, value in settings.items() if values.get(key) is None}


def training_arguments(
    config: Config, machine: dict[str, Any], processes: int | None = None
) -> tuple[TrainingArguments, list[str]]:
    cls, values, notes = config.objective.config, config.values | machine, []
    if (factor := values.get("learning_rate_factor", 1.0)) != 1.0:  # an adapter's
        rate = values.get("learning_rate", cls.learning_rate)
        values["learning_rate"] = rate * factor
        notes.append(f"learning rate {rate * factor:g}: {factor:g} times the recipe's {rate:g}")
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        notes.append(f"max_steps {values['max_steps']} overrides num_train_epochs {values['num_train_epochs']:g}")
    values["chat_template_path"] = find_template(values.get("chat_template_path") or "") or None
    if (layers := values.get("activation_checkpointing_layers")) is not None:
        values["activation_checkpointing"] = layers == "auto" or layers > 0
    args = fill(cls, values | accumulation_steps(values, cls.per_device_train_batch_size, processes or world_size()))
    if args.n_gpu > 1:  # Trainer would wrap the model in DataParallel and multiply the batch
        raise HFTError("several GPUs are visible to one process: add --num_processes, or set CUDA_VISIBLE_DEVICES=0")
    if config.method.adapter and config.run.save_only_trained:
        raise HFTError("an adapter's folder holds only what trained anyway; remove save_only_trained")
    if args.warmup_steps and args.lr_scheduler_type.value in ("constant", "reduce_lr_on_plateau", "greedy"):
        notes.append(f"lr_scheduler_type {args.lr_scheduler_type.value} ignores warmup_steps {args.warmup_steps:g}")
    trainer_class(config).check(args, *config.method.parts)
    return args, notes


def accumulation_steps(values: dict[str, Any], default: int, processes: int) -> dict[str, int]:
    """Gradient accumulation that makes the global batch what the recipe says; `default` rows per device."""
    if (total := values.get("global_batch_size")) is None:
        return {}
    if "gradient_accumulation_steps" in values:
        raise HFTError("gradient_accumulation_steps follows from global_batch_size; to give it, set that to none")
    per_device = values.get("per_device_train_batch_size", default)
    accumulation, remainder = divmod(total, per_device * processes)
    if remainder or not accumulation:
        raise HFTError(
            f"global_batch_size {total} is not a multiple of {per_device} rows per device x {processes} processes; "
            "change --per_device_train_batch_size"
        )
    return {"gradient_accumulation_steps": accumulation}


def checkpointed_of(config: Config, machine: dict[str, Any], args: TrainingArguments, selection: Selection) -> range:
    """The indices of the layers whose activations are checkpointed."""
    count, first = selection.anatomy.num_layers, config.run.activation_checkpointing_layers
    first = machine.get("activation_checkpointing_layers", count) if first == "auto" else first
    kwargs, adapter = args.activation_checkpointing_kwargs or {}, config.method.adapter
    if first is not None and not 0 <= first <= count:
        raise HFTError(f"activation_checkpointing_layers must lie in 0..{count}, the model's layers, got {first}")
    if first is not None and "every_n_layers" in kwargs:
        raise HFTError("activation_checkpointing_layers and every_n_layers both say which layers; give one of them")
    if not args.activation_checkpointing or (adapter and not adapter.keeps_checkpointing):
        return range(0)
    return range(first) if first is not None else range(0, count, kwargs.get("every_n_layers", 1))


def check_packages(values: dict[str, Any]) -> None:
    values = values | (values.get("model_init_kwargs") or {})
    for key, pattern, modules, package in NEEDED:
        if re.fullmatch(pattern, value := str(values.get(key))) and not any(map(find_spec, modules.split())):
            raise HFTError(f"{key} {value.lower()} needs a package: pip install {package}")


def check_arguments(args: TrainingArguments, model_config: PretrainedConfig) -> None:
    """Refuse what Trainer would find out when it reports, evaluates, makes the optimizer or schedules its rate."""
    if args.eval_on_start and args.eval_strategy == "no":
        raise HFTError("eval_on_start evaluates, and eval_strategy is no: add --eval_on_start false")
    if args.fp16 and args.device.type == "cpu":
        raise HFTError("fp16 needs a GPU: take bf16, or neither")
    for key, by, pattern in IGNORED:
        if (value := getattr(args, key)) and re.fullmatch(pattern, other := getattr(args, by).value):
            raise HFTError(f"{by} {other} ignores {key} {value}; change one of them")
    weight, scheduler, about = torch.zeros(1, requires_grad=True), args.lr_scheduler_type.value, "report_to"
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()  # asks for its package
        about = f"optim {getattr(args.optim, 'value', args.optim)} with optim_args {args.optim_args}"
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, meta_model(model_config))
        if not kwargs.keys() & {"params", "model", "optimizer_dict"}:  # those take the model's parameters
            optimizer([weight], **kwargs)
        about = f"lr_scheduler_type {scheduler} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        steps = {"num_warmup_steps": args.get_warmup_steps(100), "num_training_steps": 100}
        get_scheduler(scheduler, torch.optim.SGD([weight]), **steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise HFTError(f"{about}: {reason(error)}") from error


def check_positions(config: PretrainedConfig, args: TrainingArguments, prompt: int = 0) -> list[str]:
    """Refuse rows that may exceed a model's learned positions, `prompt` of them an adapter's; note rotary ones."""
    config = config.get_text_config()
    most, length = getattr(config, "max_position_embeddings", None), args.max_length
    if not most or (length is not None and length + prompt <= most):
        return []
    for name, module in meta_model(config).named_modules():
        if isinstance(module, nn.Embedding) and re.search("wpe|position", name):
            raise HFTError(f"max_length {length} exceeds the base's {most} positions; set --max_length {most - prompt}")
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    if length is None or not rope or any(one.get("rope_type", "default") != "default" for one in by_layer):
        return []
    return [f"max_length {length} exceeds the {most} positions of the base, and its RoPE is not scaled"]


def check_saving(base: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> None:
    """Refuse what cannot be saved beside the weights, as transformers would do at the first checkpoint."""
    parts: dict[str, Any] = {"config": config, "tokenizer": tokenizer}
    with suppress(OSError):  # it has none
        generation = GenerationConfig.from_pretrained(base, revision=revision or "main")
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):  # as Trainer; then it is checked strictly
            named, own = getattr(generation, token), getattr(tokenizer, token)
            if own not in (named if isinstance(named, list) else [named]):
                setattr(generation, token, own)
        parts["generation_config"] = generation
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            try:
                part.save_pretrained(folder)
            except Exception as error:  # tokenizers raises whatever its parsers do
                what = f"the {name} of {base} cannot be saved: {reason(error)}"
                raise HFTError(f"{what}; correct it in a copy of the base") from error
