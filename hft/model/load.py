"""Loads a base in the dtype its weights are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, set_seed

from hft.errors import HFTError, reason
from hft.model.anatomy import architecture_of, meta_model
from hft.model.weights import MODEL_CONFIG, Weights, check_is_there, dtypes_of, local_folder, widest

if TYPE_CHECKING:  # the trainer's arguments import peft
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments


def read_config(name: str, source: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The config of a model, unless it is quantized, from a folder or Hub id; `name` is for messages."""
    part = Path(source) / MODEL_CONFIG
    check_is_there(str(source))
    try:
        # transformers would ask on the terminal whether to run code that comes with a model.
        source = part if part.exists() else source
        config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        if "custom code" in str(error):
            raise HFTError(
                f"{name} comes with its own code, which hft never runs; give a model that transformers has"
            ) from error
        raise HFTError(f"cannot read the config of {name}: {reason(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise HFTError(f"{name} is quantized; give the original model")
    return config


def plain_generation(model: PreTrainedModel, **settings: Any) -> GenerationConfig:
    """How a model generates where its own generation config, such as a repetition penalty or beams, is not meant.

    Only the ids of its special tokens are kept; `settings` win over them.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(model.generation_config, name) for name in names} | settings)


def load_base(
    name: str, args: TrainingArguments, auto_class: type | None = None, **more: Any
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load a base, each tensor in the dtype that it is stored in, whatever the config says.

    Args:
        name: path or Hub id.
        args: its `model_init_kwargs` go to `from_pretrained`, as `more` do; a `dtype` among them wins.
        auto_class: transformers' class of the model, such as `AutoModelForSequenceClassification`; by default that of
            a language model. A head that the base lacks is made in fp32, from the seed of `args`, as TRL makes it.

    Returns:
        The model, and the dtype on disk of each of its parameters and stored buffers.
    """
    init_kwargs = (getattr(args, "model_init_kwargs", None) or {}) | more
    folder = local_folder(name, init_kwargs.get("revision"))
    config = read_config(name, folder)
    model = meta_model(config, auto_class)
    parameters, on_disk = dict(model.named_parameters()), Weights(folder)
    stored = dtypes_of(model, on_disk)
    needed, asked = widest(stored[key] for key in parameters), init_kwargs.get("dtype")
    asked = getattr(torch, asked, None) if isinstance(asked, str) else asked  # "auto" would be the config's
    if asked and torch.promote_types(asked, needed) != asked:
        raise HFTError(f"dtype {asked} would round the base, which is stored in {needed}; leave it out")
    init_kwargs["dtype"] = asked or needed
    in_base = {id(parameter) for parameter in model.base_model.parameters()}
    new_head = {key for key in parameters if auto_class and key not in on_disk and id(parameters[key]) not in in_base}
    if new_head:
        set_seed(args.seed)
        init_kwargs["dtype"] = torch.float32
    try:
        model = (auto_class or architecture_of(config)).from_pretrained(name, **init_kwargs)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise HFTError(f"cannot load {name}: {reason(error)}") from error
    for key, parameter in model.named_parameters():
        if parameter.dtype == init_kwargs["dtype"] and key not in new_head:  # transformers may keep some wider
            parameter.data = parameter.data.to(asked or stored[key])
    for key, buffer in model.named_buffers():
        if key in on_disk and buffer.is_floating_point():  # which transformers may have rounded
            buffer.data = on_disk[key].to(buffer.device, widest((buffer.dtype, stored[key])))
    return model, stored
