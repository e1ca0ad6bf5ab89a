"""What a run's settings need, asked before anything is loaded: packages, positions, a schedule, files that save."""

from __future__ import annotations

import re
import tempfile
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError, reason
from hft.model.anatomy import meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

# Key, its values, the modules that have it, and what pip calls the first where the name is another. Trainer names those
# of optimizers.
NEEDED = (
    ("report_to", "azure_ml", "azureml", "azureml-mlflow"),
    ("report_to", "flyte", "flytekit", ""),
    ("report_to", "comet_ml", "comet_ml", "comet-ml"),
    ("report_to", "tensorboard", "tensorboard tensorboardX", ""),
    ("report_to", "(wandb|trackio|mlflow|neptune|codecarbon|clearml|dagshub|dvclive|swanlab)", r"\1", ""),
    ("use_liger_kernel", "True", "liger_kernel", "liger-kernel"),
    ("deepspeed", "(?!None).*", "deepspeed", "'half-fine-tuning[deepspeed]'"),
    ("attn_implementation", "flash_attention_[24]", "flash_attn kernels", "flash-attn"),
    ("attn_implementation", "flash_attention_3", "flash_attn_interface kernels", "flash-attn-3"),
    ("attn_implementation", ".+/.+", "kernels", ""),
)


def check_packages(values: dict[str, Any]) -> None:
    """Refuse values that need a package which is not installed."""
    values = values | (values.get("model_init_kwargs") or {})
    for key, pattern, modules, package in NEEDED:
        for value in map(str, values[key] if isinstance(values.get(key), list) else [values.get(key)]):
            found = re.fullmatch(pattern, value)
            if found and not any(map(find_spec, names := found.expand(modules).split())):
                raise HFTError(f"{key} {value.lower()} needs a package: pip install {package or names[0]}")


def check_arguments(args: TrainingArguments, model_config: PretrainedConfig) -> None:
    """Refuse what Trainer would find out when it reports, evaluates, makes the optimizer or schedules its rate."""
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    if args.eval_on_start and args.eval_strategy == "no":
        raise HFTError("eval_on_start evaluates, and eval_strategy is no: add --eval_on_start false")
    if args.fp16 and args.device.type == "cpu":
        raise HFTError("fp16 needs a GPU: take bf16, or neither")
    weight, scheduler = torch.zeros(1, requires_grad=True), args.lr_scheduler_type.value
    about = "report_to"
    try:
        get_reporting_integration_callbacks(args.report_to)
        about = f"optim {getattr(args.optim, 'value', args.optim)} with optim_args {args.optim_args}"
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, meta_model(model_config))
        if not kwargs.keys() & {"params", "model", "optimizer_dict"}:  # those take the model's parameters
            optimizer([weight], **kwargs)
        about = f"lr_scheduler_type {scheduler} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        steps = {"num_warmup_steps": args.get_warmup_steps(100), "num_training_steps": 100}
        plain = torch.optim.SGD([weight], lr=1.0)
        get_scheduler(scheduler, plain, **steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise HFTError(f"{about}: {reason(error)}") from error


def check_positions(config: PretrainedConfig, args: TrainingArguments, prompt: int = 0) -> list[str]:
    """Refuse rows that may exceed a model's learned positions, `prompt` of them an adapter's; note rotary ones."""
    from torch import nn

    config = config.get_text_config()
    most, length = getattr(config, "max_position_embeddings", None), args.max_length
    if not most or (length is not None and length + prompt <= most):
        return []
    modules = meta_model(config).named_modules()
    learned = [name for name, one in modules if isinstance(one, nn.Embedding) and re.search("wpe|position", name)]
    if learned:
        raise HFTError(
            f"max_length {length} exceeds the {most} positions of the base; give --max_length {most - prompt}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    if length is None or not rope or any(one.get("rope_type", "default") != "default" for one in by_layer):
        return []
    return [f"max_length {length} exceeds the {most} positions of the base, and its RoPE is not scaled"]


def check_saving(base: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> None:
    """Refuse what cannot be saved beside the weights, as transformers would do at the first checkpoint."""
    from transformers import GenerationConfig

    parts: dict[str, Any] = {"config": config, "tokenizer": tokenizer}
    try:
        generation = GenerationConfig.from_pretrained(base, revision=revision or "main")
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):  # as Trainer; then it is checked strictly
            named, own = getattr(generation, token), getattr(tokenizer, token)
            if own not in (named if isinstance(named, list) else [named]):
                setattr(generation, token, own)
        parts["generation_config"] = generation
    except OSError:  # it has none
        pass
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            try:
                part.save_pretrained(folder)
            except Exception as error:  # tokenizers raises whatever its parsers do
                raise HFTError(
                    f"the {name} of {base} cannot be saved: {reason(error)}; correct it in a copy of the base"
                ) from error
