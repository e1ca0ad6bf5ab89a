"""YAML files and flags -> one typed, checked config."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from hft.catalog import find_recipe
from hft.errors import HFTError, did_you_mean, read_text, reason

T = TypeVar("T")
Bare = type("Bare", (str,), {})  # the value of a flag that no word follows
Fraction = Annotated[float, Field(ge=0, le=1)]
Reset = Callable[[Mapping[str, Any]], Container[str]]  # a config's keys that a file with a `method` resets
Percent = Annotated[float, Field(ge=0, le=100)]

# The templates that make turns of text, which TRL reads without a chat template.
TURNS = {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}

# Keys of TRL's configs and of `from_pretrained` that hold a secret.
SECRETS = ("hub_token", "token", "use_auth_token", "api_key")
# What numbers of TRL's configs must be, by keys; TRL and transformers take any.
BOUNDS = {
    "num_train_epochs save_steps": Field(gt=0),
    "learning_rate weight_decay warmup_steps beta logging_steps eval_steps dataloader_num_workers": Field(ge=0),
    "max_length pad_to_multiple_of per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "eval_accumulation_steps precompute_ref_batch_size ref_model_sync_steps": Field(gt=0),
}
# transformers is renaming these; under either name the later value wins.
ALIASES = {f"gradient_checkpointing{end}": f"activation_checkpointing{end}" for end in ("", "_kwargs")}
# Keys by other tools' words for them, with a value where that differs too.
WORDS = {
    "model_name_or_path": "model base_model",
    "dataset_name": "dataset datasets data data_path train_file",
    "global_batch_size": "train_batch_size",
    "num_train_epochs": "epochs",
    "dataset_weights": "interleave_probs",
    "assistant_only_loss": "train_on_inputs train_on_prompt roles_to_train mask_history",
    "packing": "sample_packing",
    "max_length": "seq_len sequence_len cutoff_len",
    "learning_rate": "lr",
    "per_device_train_batch_size": "micro_batch_size",
    "eval_rows": "val_set_size val_size",
    "beta": "rl_beta pref_beta",
    "rank": "lora_r lora_rank",
    "target_modules": "lora_target_modules lora_target lora_target_linear",
    "schedule: badam": "use_badam",
    "schedule: lisa": "lisa_n_layers lisa_step_interval",
    "policy: explicit": "unfrozen_parameters freeze_trainable_layers",
    "--engine fsdp2": "accelerate_config",
    "warmup_steps: 0.03": "warmup_ratio",  # below 1 a fraction of all steps
    "train_sampling_strategy: group_by_length": "group_by_length",
    "adapter: lora": "use_peft",
    "adapter: qlora": "load_in_4bit load_in_8bit",
    "model_init_kwargs: {dtype: float32}": "dtype torch_dtype",
    "model_init_kwargs: {revision: main}": "model_revision revision",
    "model_init_kwargs: {attn_implementation: sdpa}": "attn_implementation flash_attn flash_attention",
}


def option(help: str, default: Any = None, **more: Any) -> Any:
    """A dataclass's field with the help that `--help` prints."""
    kind = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return field(**kind, metadata={"help": help}, **more)


def help_of(key: dataclasses.Field) -> str:
    """The help of a key; TRL and transformers write theirs for argparse, which wants percent signs twice."""
    return key.metadata.get("help", "").replace("%%", "%")


@dataclass
class RunConfig:
    """What a run needs beyond TRL's config and the method's keys: model, data, batch and names."""

    model_name_or_path: str | None = option("The base: a folder or a Hub id.")
    architecture: str | None = option("A folder with the base's config.json, to plan a run without the Hub.")
    chat_template_path: str | None = option("A .jinja file, or hft's own tulu.jinja or smollm2.jinja.")
    dataset_name: str | list[str] | None = option("A file, a folder with one file per split, or a Hub id; or several.")
    dataset_weights: list[float] | None = option("Sampling weights of several datasets, until one runs out of rows.")
    prompt: str | None = option("SFT: Jinja template of the user's turn, over the columns of a row.")
    completion: str | None = option("SFT: the same for the assistant's turn.")
    dataset_config: str | None = option("Configuration of a Hub dataset.")
    dataset_revision: str | None = option("Branch, tag or commit of a Hub dataset; by default its main branch.")
    dataset_train_split: str = option("Split to train on.", "train")
    dataset_test_split: str | None = option("Split to evaluate on; none: hold rows out of the training split.", "test")
    tokenizer_pad_token: str | None = option("Token to pad with, from the vocabulary, if the tokenizer has none.")
    global_batch_size: PositiveInt | None = option("Rows per step over all devices; gradient accumulation follows.")
    eval_rows: PositiveInt | None = option("Rows to evaluate on: first of the test split, or held-out training rows.")
    activation_checkpointing_layers: int | Literal["auto"] | None = option(
        "How many layers to checkpoint, from the first, whatever activation_checkpointing says; auto: as few as fit."
    )
    save_only_trained: bool = option("Save only what trains, also in tensors; see hft merge --method delta.", False)
    method: str | None = option("Name of the method, for the run's name.")
    schedule: str | None = option("Change what trains during the run: lisa, badam, ... or FILE.py:CLASS.")
    update: str | None = option("Change weights around each step: mixout, l2sp, mofo, gmt or FILE.py:CLASS.")
    adapter: str | None = option("Train an adapter instead: lora, qlora, adalora, p-tuning-v2, osf.")
    strategy: str | None = option("Continual-learning strategy of a sequence of tasks; see hft continual.")
    dry_run: bool = option("Print the plan and stop before anything is loaded.", False)

    def __post_init__(self):
        if (self.prompt is None) != (self.completion is None):
            raise HFTError("prompt and completion are templates that belong together; give both")
        weights, several = self.dataset_weights, isinstance(self.dataset_name, list)
        if weights and not (several and len(weights) == len(self.dataset_name) and min(weights) > 0):
            raise HFTError("dataset_weights needs several names in dataset_name, and a number above 0 for each")


@dataclass(frozen=True)
class Keys:
    """The keys that a command takes: the fields of some dataclasses."""

    classes: tuple[type, ...]
    explain: Callable[[str], str | None] = lambda key: None  # a sentence about a key that is not among them, or None
    replaced: Reset = lambda config: ()

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """Their types, by name; a `Literal` where a dataclass lists the choices beside the type."""
        found = {}
        for cls in self.classes:
            hints, is_trls = get_type_hints(cls, include_extras=True), hasattr(cls, "per_device_train_batch_size")
            for f in (f for f in fields(cls) if f.init):
                choices = f.metadata.get("choices")
                annotation = _bounded(f.name, hints[f.name]) if is_trls else hints[f.name]
                found[f.name] = Literal[*choices, f.default] if choices else annotation
        return found

    def convert(self, key: str, value: Any) -> Any:
        """A value from YAML, or of a flag, as the type of its key."""
        if isinstance(value, str) and value.startswith("~/") and key not in (*TURNS, "dataset_name"):
            value = str(Path(value).expanduser())  # which a shell does not do in YAML and after `--key=`
        if key in self.types:
            return convert(key, value, self.types[key])
        known = [name for name, words in WORDS.items() if key in words.split()]
        hint = f", did you mean {known[0]!r}?" if known else did_you_mean(key, self.types)
        raise HFTError(self.explain(key) or f"unknown key {key!r}{hint}")


def convert(key: str, value: Any, annotation: Any) -> Any:
    """A value from YAML or the command line as a type; `key` is for the message."""
    kinds = set(_alternatives(annotation))
    if isinstance(value, str) and dict in kinds and value.lstrip().startswith("{"):
        value = _parsed(value, key)
    if isinstance(value, Bare) and bool not in kinds and key != "resume_from_checkpoint":
        raise HFTError(f"{key}: expected {_type_names(annotation)}, got no value")
    if NoneType in kinds and not {str, list} <= kinds and str(value).lower() in ("none", "null"):
        return None
    try:
        if isinstance(value, bool) and not kinds & {bool, Any}:  # pydantic would take it for a number
            raise TypeError
        converted = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except (ValidationError, TypeError) as error:
        if list in kinds and not isinstance(value, list | dict | bool | NoneType):
            return convert(key, [value], annotation)
        wrong = error.errors() if isinstance(error, ValidationError) else []
        bounds = [one["msg"] for one in wrong if one["type"].startswith(("greater", "less", "finite"))]
        words = bounds[0].replace("Input should be", "a number").replace("number a finite", "finite") if bounds else ""
        got = json.dumps(value) if isinstance(value, bool | NoneType) else repr(value)
        raise HFTError(f"{key}: expected {words or _type_names(annotation)}, got {got}") from error
    return converted.value if isinstance(converted, Enum) else converted


def check_types(config: Any) -> None:
    """Check the values of a dataclass as those of a command are checked."""
    keys = Keys((type(config),))
    for key, value in vars(config).items():
        keys.convert(key, value)


def _bounded(key: str, annotation: Any) -> Any:
    """The type of a key with its bound; the only text beside a number is auto."""
    if not (bound := [bound for keys, bound in BOUNDS.items() if key in keys.split()]):
        return annotation
    types = {int: Annotated[int, *bound], float: Annotated[float, *bound], str: Literal["auto"]}
    return Union[tuple(types.get(kind, kind) for kind in get_args(annotation) or [annotation])]  # noqa: UP007


def _alternatives(annotation: Any) -> Iterable[Any]:
    """The alternatives of a union: `list[str] | Literal["a"] | None` gives list, "a" and NoneType."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (list, dict, tuple) or not get_args(annotation):
        return [get_origin(annotation) or annotation]
    return [member for each in get_args(annotation) for member in _alternatives(each)]


def _type_names(annotation: Any) -> str:
    names = {"str": "text", "NoneType": "null", "bool": "true or false", "int": "an integer", "float": "a number"}
    names |= {"list": "a list", "dict": "a mapping", "Any": "anything", "ByteSize": "a size such as 80GiB"}
    kinds = [kind for kind in dict.fromkeys(_alternatives(annotation)) if kind is not NoneType]
    if enums := [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]:
        kinds = [member.value for member in enums[0]]
    words = [getattr(kind, "__name__", None) or repr(kind) for kind in kinds]
    *first, last = (names.get(word, word) for word in words)
    return f"{', '.join(first)} or {last}" if first else last


class Loader(yaml.SafeLoader):
    """YAML whose bools and numbers are YAML 1.2's, `no` a word and 1e-4 a number; no key stands twice in a mapping."""

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep=deep)


class Dumper(yaml.SafeDumper):
    """Writes text so that `Loader` and YAML 1.1 both read it as text."""


BOOL, INT, FLOAT, DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
# pydantic still takes yes, no, on and off where a bool is asked for.
Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, INT, FLOAT, DATE)]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(BOOL, re.compile("^(?:true|false|True|False|TRUE|FALSE)$"), list("tTfF"))
NUMBER = re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.IGNORECASE)
Loader.add_constructor(INT, lambda _, node: int(node.value, 0 if node.value[1:2] in ("o", "x") else 10))
for resolving in (Loader, Dumper):
    resolving.add_implicit_resolver(INT, re.compile("^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
    resolving.add_implicit_resolver(FLOAT, NUMBER, list("-+.0123456789"))


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise HFTError(f"{where} is not valid YAML: {reason(error)}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    content = _parsed(read_text(path), str(path))
    if not isinstance(content, dict):
        raise HFTError(f"{path} must be a YAML mapping of keys to values")
    return content


def to_yaml(config: Mapping[str, Any]) -> str:
    """A config as YAML that reads back as itself."""
    return yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Given:
    """What a command was given, before types are checked."""

    files: list[str]
    contents: list[dict[str, Any]]  # of the files
    flags: dict[str, Any]  # text, or a list where several words follow a flag

    def merge(self, replaced: Reset = lambda config: ()) -> tuple[dict[str, Any], dict[str, str]]:
        """Layer files and flags, later ones winning: untyped values, and the file of those that are from one."""
        merged: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for path, content in zip(self.files, map(renamed, self.contents), strict=True):
            reset = replaced(merged) if "method" in content else ()
            merged = {key: value for key, value in merged.items() if key not in reset} | content
            sources |= dict.fromkeys(content, path)
        flags = renamed(self.flags)
        return merged | flags, {key: path for key, path in sources.items() if key not in flags}

    def split(self, cls: type) -> tuple[Given, Given]:
        """What was given of the keys of a dataclass, and of all others."""
        names, layers = {f.name for f in fields(cls)}, [*self.contents, self.flags]
        own = [{key: value for key, value in layer.items() if key in names} for layer in layers]
        rest = [{key: value for key, value in layer.items() if key not in names} for layer in layers]
        return Given(self.files, own[:-1], own[-1]), Given(self.files, rest[:-1], rest[-1])

    def take(self, cls: type[T]) -> tuple[T, Given]:
        own, rest = self.split(cls)
        return fill(cls, own.resolve(Keys((cls,)))[0]), rest

    def resolve(self, keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
        """Layer files and flags, and type them: all values that were given, and those among them that were flags."""
        merged, sources = self.merge(keys.replaced)
        values = {}
        for key, value in merged.items():
            try:
                values[key] = keys.convert(key, value)
            except HFTError as error:
                raise (HFTError(f"{sources[key]}: {error}") if key in sources else error) from error
        refuse_secrets(values)
        # A run without these is named after what it is.
        values = {key: value for key, value in values.items() if value or key not in ("output_dir", "run_name")}
        return values, {key: values[key] for key in renamed(self.flags) if key in values}


def renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file or of flags under the newest names of their keys."""
    return {ALIASES.get(str(key), str(key)): value for key, value in content.items()}


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Refuse keys that hold a secret, also inside other keys: a config is printed, and saved beside the model."""
    for key, value in values.items():
        if key in SECRETS and isinstance(value, str):
            raise HFTError(f"{key} would be saved with the config; remove it, and set HF_TOKEN or run `hf auth login`")
        if isinstance(value, Mapping):
            refuse_secrets(value)


def read_arguments(arguments: Sequence[str], prog: str, about: str, groups: Mapping[str, Iterable[type]]) -> Given:
    """Read `--config A.yaml B.yaml --key value ...` and its files; `--help` prints the keys of `groups`, by heading."""
    if {"-h", "--help"} & set(arguments):
        print_help(prog, about, groups)
        raise SystemExit(0)
    files: list[str] = []
    flags: dict[str, Any] = {}
    target: list[str] | None = None
    for word in arguments:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            target = files if key == "config" else flags.setdefault(key.replace("-", "_"), [])
            if target is not files:
                target.clear()
            target += [value] if equals else []
        elif target is None:
            raise HFTError(f"{word!r} does not follow a flag; see {prog} --help")
        else:
            target.append(word)
    values = {key: words[0] if len(words) == 1 else words or Bare("true") for key, words in flags.items()}
    if "method" in values and (RunConfig,) in groups.values():
        raise HFTError(f"a method is a file, not a flag: --config RECIPE {values['method']}")
    return read_files(files, values)


def read_files(files: Sequence[str | Path], flags: dict[str, Any]) -> Given:
    paths = [str(find_recipe(file)) for file in files]
    return Given(paths, [read_yaml(path) for path in paths], flags)


def print_help(prog: str, description: str, groups: Mapping[str, Iterable[type]]) -> None:
    print(f"usage: {prog} [--config FILE ...] [--key value ...]\n\n{description}\n")
    print("  --config FILE ...\n      files, or names from `hft recipes`; later ones win, then flags")
    shown: set[str] = set()
    for heading, classes in groups.items():
        print(f"\n{heading}:", flush=True)
        keys = Keys(tuple(classes))
        for f in (f for cls in keys.classes for f in fields(cls) if f.init and f.name not in shown):
            shown.add(f.name)
            default = getattr(f.default, "value", f.default)
            text = help_of(f) + ("" if default in (None, MISSING) else f" (default: {default})")
            print(f"  --{f.name}  {_type_names(keys.types[f.name])}")
            print(textwrap.fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))


def fill(cls: type[T], config: Mapping[str, Any]) -> T:
    """A dataclass filled with those keys of a config that are its fields."""
    try:
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.init and f.name in config})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise HFTError(reason(error)) from error
