"""Loads a base in the dtype its weights are stored in, and says whether a vocabulary belongs to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, set_seed

from hft.errors import HFTError, reason
from hft.model.anatomy import architecture_of, meta_model
from hft.model.weights import MODEL_CONFIG, Weights, check_is_there, dtypes_of, local_folder, widest

if TYPE_CHECKING:  # the trainer's arguments import peft
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

# Of `model_init_kwargs`: what loads other files than those that are hashed, and fields of a config that leave the
# function that a model computes as it is.
OTHER_FILES = ("variant", "use_safetensors", "subfolder", "gguf_file")
NO_CHANGE = re.compile(r"dtype|use_cache|return_dict|output_\w+|\w*(dropout|pdrop|aux_loss)\w*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


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
            why = f"{name} comes with its own code, which hft never runs"
            raise HFTError(f"{why}; give a model that transformers has") from error
        raise HFTError(f"cannot read the config of {name}: {reason(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise HFTError(f"{name} is quantized; give the original model")
    return config


def plain_generation(model: PreTrainedModel, **settings: Any) -> GenerationConfig:
    """How a model generates without its own generation config, such as beams, but with its special tokens."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(model.generation_config, name) for name in names} | settings)


def check_init_kwargs(init_kwargs: Mapping[str, Any], name: str, adapted: PretrainedConfig | None = None) -> None:
    """Refuse what would load another model than the base: for an adapter that is one with another config, too."""
    if "torch_dtype" in init_kwargs:
        raise HFTError("model_init_kwargs: torch_dtype is named dtype; rename it")
    if others := [key for key in OTHER_FILES if init_kwargs.get(key) not in (None, True)]:
        raise HFTError(f"model_init_kwargs: {others[0]} would load other files than hft reads; remove it")
    for key, value in init_kwargs.items() if adapted else ():
        if not NO_CHANGE.fullmatch(key) and getattr(adapted, key, value) != value:
            why = f"{key} {value} changes the base, and an adapter's folder holds no config.json"
            raise HFTError(f"model_init_kwargs: {why}; change that of a copy of {name}, and train on the copy")


def asked_dtype(init_kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that `from_pretrained` is asked for; None, as for "auto", is that of the files."""
    if (asked := init_kwargs.get("dtype")) in (None, "auto"):
        return None
    found = getattr(torch, str(asked).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise HFTError(f"model_init_kwargs: torch has no dtype {asked!r}; take float32, bfloat16 or auto")
    return found


def load_base(
    name: str, args: TrainingArguments, auto_class: type | None = None, *, adapted: bool = False, **more: Any
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load a base, each tensor in the dtype that it is stored in, and say which dtypes these are.

    A `dtype` in the `model_init_kwargs` of `args` wins. A head of an `auto_class` that the base lacks is made in fp32,
    from the seed of `args`, as TRL makes it. `adapted` says that an adapter will be put on the base.
    """
    init_kwargs = (getattr(args, "model_init_kwargs", None) or {}) | more
    folder = local_folder(name, init_kwargs.get("revision"))
    config = read_config(name, folder)
    check_init_kwargs(init_kwargs, name, config if adapted else None)
    model = meta_model(config, auto_class)
    parameters, on_disk = dict(model.named_parameters()), Weights(folder)
    stored = dtypes_of(model, on_disk)
    needed, asked = widest(stored[key] for key in parameters), asked_dtype(init_kwargs)
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


def vocabulary(folder: Path) -> dict[str, int]:
    """The id of each token of a model folder's tokenizer; empty if the folder has none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return {}
    try:
        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # tokenizers raises whatever its parsers do
        raise HFTError(f"cannot read the tokenizer of {folder}: {reason(error)}") from error


def ids_beyond(tokens: dict[str, int], rows: int) -> list[str]:
    """A sentence if tokens have ids beyond the rows of the embeddings, as Gemma 3 1B's has for images."""
    beyond = sorted((index, token) for token, index in tokens.items() if index >= rows)
    if not beyond:
        return []
    index, token = beyond[0]
    return [
        f"the tokenizer has {len(beyond)} ids without a row in the embeddings, which have {rows}, the first is "
        f"{index}, {token!r}: text that holds one cannot be used"
    ]


def check_same_ids(ours: dict[str, int], theirs: dict[str, int], names: tuple[str, str]) -> None:
    """Refuse two vocabularies that have different tokens for one id: that row of the embeddings would be mixed."""
    tokens = {index: token for token, index in ours.items()}
    for token, index in sorted(theirs.items(), key=lambda item: item[1]):
        if tokens.get(index, token) != token:
            both = f"{names[0]} and {names[1]} do not fit together"
            raise HFTError(f"{both}: id {index} is {tokens[index]!r} in the first and {token!r} in the second")
