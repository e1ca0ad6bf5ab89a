"""From recipe, method and flags to the settings of a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from hft.config import Parser, RunConfig, to_yaml
from hft.errors import HFTError
from hft.machine import indented, say, world_size
from hft.methods.adapter import check_keys
from hft.planning.memory import cpu_has_bfloat16
from hft.record.manifest import rounds_so_far
from hft.runs import method as methods
from hft.runs.folder import RUN_KEYS
from hft.runs.stages import STAGES, Stage

# What our commands set differently from TRL; a recipe or a flag still wins.
DEFAULTS = {
    "report_to": "wandb",
    "resume_from_checkpoint": "auto",  # a killed run goes on when its command is given again
    "include_num_input_tokens_seen": "non_padding",  # so that Trainer logs tokens per second
}


def parser_of(stage: Stage) -> Parser:
    """The parser of a stage's config, which knows keys of other stages by name."""
    classes = (RunConfig, *methods.CONFIGS, stage.config_class)
    own = {f.name for cls in classes for f in fields(cls)}
    others = {f.name: s.name for s in STAGES.values() for f in fields(s.config_class) if f.name not in own}
    return Parser(*classes, elsewhere=others, method_keys=methods.KEYS)


def with_defaults(stage: Stage, config: dict, flags: dict, files: Sequence[str]) -> dict[str, Any]:
    """A config complete with a name and an output folder.

    The name is that of the output folder if one is given. Else it tells recipe, stage and method, and each flag that
    makes the run another one, so that the same command finds its own folder again and another never writes into it.
    """
    if not config.get("model_name_or_path") or not config.get("dataset_name"):
        raise HFTError("model_name_or_path and dataset_name are needed: give a recipe with --config, or both as flags")
    config = DEFAULTS | config
    if "model_name_or_path" in flags and "architecture" not in flags:
        config.pop("architecture", None)  # the recipe's is that of the recipe's model
    check_keys(config)
    if "learning_rate" in flags and "learning_rate_factor" in config:
        config["learning_rate_factor"] = 1.0
    if not config.get("adapter") and (rounds := rounds_so_far(config["model_name_or_path"])):
        config = {"round": rounds[-1]["selection"]["round"] + 1} | config
    if "output_dir" in flags and "run_name" not in flags:
        config["run_name"] = Path(flags["output_dir"]).name
    elif "run_name" not in config:
        source = Path(files[0]).resolve().parent.name if files else Path(config["model_name_or_path"]).name
        name = "-".join([source, stage.name, config.get("method") or "hft"])
        told = {key: _short(value) for key, value in flags.items() if key not in RUN_KEYS}
        name += "".join(f"-from-{v}" if k == "model_name_or_path" else f"-{k}={v}" for k, v in told.items())
        if len(name) > 120:  # most file systems stop at 255 bytes
            name = name[:110] + "-" + hashlib.sha256(name.encode()).hexdigest()[:9]
        config["run_name"] = name
    return {"output_dir": f"runs/{config['run_name']}", **config}


def load_model_config(run_config: RunConfig) -> PretrainedConfig:
    """The base's config, from the recipe's `architecture` folder where it has one.

    Raises:
        HFTError: it cannot be had, or the model is quantized.
    """
    source = run_config.model_name_or_path
    if run_config.architecture and not Path(source).is_dir():
        source = run_config.architecture
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = f"; `hft fetch {Path(source).name}` makes it" if source.startswith("models/") else ""
        reason = str(error).strip().partition("\n")[0]
        raise HFTError(f"cannot read the config of {source}: {reason}{hint}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise HFTError(f"{source} is quantized; half fine-tuning trains the weights themselves, give the original")
    return config


def load_tokenizer(run_config: RunConfig, chat_template_path: str | None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding with the recipe's token.

    Raises:
        HFTError: it cannot be had; neither it nor the recipe has a chat template; or the recipe's padding token is not
            in the vocabulary, where adding one would resize the embeddings.
    """
    base = run_config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise HFTError(f"cannot load the tokenizer of {base}: {str(error).strip().partition(chr(10))[0]}") from error
    if not tokenizer.chat_template and not chat_template_path:
        raise HFTError(
            f"{base} has no chat template: DPO takes the one that SFT saved, so start from an SFT run; SFT takes "
            "--chat_template_path"
        )
    if token := run_config.tokenizer_pad_token:
        if token not in tokenizer.get_vocab():
            raise HFTError(f"tokenizer_pad_token {token!r} is not in the vocabulary of {base}")
        tokenizer.pad_token = token
    return tokenizer


def for_this_machine(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that the machine decides where the config does not: CPU or not, bf16 or not."""
    settings: dict[str, Any] = {}
    on_cpu = config.get("use_cpu") or not torch.accelerator.is_available()
    if on_cpu:
        settings = {"use_cpu": True, "bf16": cpu_has_bfloat16()}
    settings = {key: value for key, value in settings.items() if config.get(key) is None}
    if settings:
        say("on this machine", indented(to_yaml(settings)))
    return settings


def rate_settings(stage: Stage, config: dict[str, Any]) -> dict[str, float]:
    """The learning rate of an adapter, whose method file gives it as a multiple of the recipe's."""
    factor = config.get("learning_rate_factor", 1.0)
    if factor == 1.0:
        return {}
    rate = config.get("learning_rate", stage.config_class.learning_rate)
    say(f"learning rate {rate * factor:g}: {factor:g} times the recipe's {rate:g}", "")
    return {"learning_rate": rate * factor}


def batch_settings(stage: Stage, config: dict[str, Any]) -> dict[str, int]:
    """Gradient accumulation that makes the global batch what the recipe says.

    Raises:
        HFTError: rows a step do not divide by rows a device times devices.
    """
    total = config.get("global_batch_size")
    if total is None:
        return {}
    if "gradient_accumulation_steps" in config:
        raise HFTError("gradient_accumulation_steps is derived from global_batch_size; give only one of them")
    per_device = config.get("per_device_train_batch_size") or stage.config_class.per_device_train_batch_size
    accumulation, left_over = divmod(total, per_device * world_size())
    if left_over or not accumulation:
        raise HFTError(
            f"global_batch_size {total} is not a multiple of {per_device} rows a device x {world_size()} processes; "
            "change --per_device_train_batch_size"
        )
    return {"gradient_accumulation_steps": accumulation}


def _short(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text.rstrip("/").rpartition("/")[2])
