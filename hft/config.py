"""Recipe, method and flags -> one typed, checked config."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from trl import TrlParser

from hft.errors import HFTError

T = TypeVar("T")


@dataclass
class RunConfig:
    """What a run needs beyond the trainer's config and the selection: model, data, batch and names."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The base: a folder or a Hub id."})
    architecture: str | None = field(
        default=None,
        metadata={"help": "A folder with the base's config.json, to plan a run before the Hub is asked for it."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A .jsonl, .json or .parquet file, a folder with a file a split, or a Hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    tokenizer_pad_token: str | None = field(
        default=None, metadata={"help": "Token to pad with, from the vocabulary, where the tokenizer names none."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows a step, over all devices; gradient accumulation is derived from it."},
    )
    eval_rows: int | None = field(
        default=None,
        metadata={"help": "Rows to evaluate on: the test split's first, or held out where there is no test split."},
    )
    method: str | None = field(default=None, metadata={"help": "Name of the method, for the run's name."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop before anything is loaded."})


class Parser(TrlParser):
    """`TrlParser` whose errors are one sentence and that accepts no abbreviated flags."""

    def __init__(self, *dataclasses: type, elsewhere: dict[str, str] | None = None, method_keys: Container[str] = ()):
        """Know the keys of some dataclasses.

        Args:
            dataclasses: what is parsed.
            elsewhere: of other keys, the stage that they belong to.
            method_keys: keys that a file which names a `method` sets anew, all of them.
        """
        super().__init__(list(dataclasses), allow_abbrev=False, prog="hft")
        self.elsewhere = elsewhere or {}
        self.method_keys = method_keys
        self.types = {name: str(t) for cls in dataclasses for name, t in get_type_hints(cls).items()}
        self.keys = [f.name for cls in dataclasses for f in fields(cls) if f.init]
        # Without defaults, what parsing returns is what was given.
        self.set_defaults_with_config(**dict.fromkeys(self.keys, argparse.SUPPRESS))

    def error(self, message: str):
        raise HFTError(re.sub(r"^argument --(\w+)\S*:", r"\1:", message))

    def unknown(self, key: str) -> HFTError:
        if key in self.elsewhere:
            return HFTError(f"{key!r} is a key of {self.elsewhere[key]}, not of this stage")
        near = difflib.get_close_matches(key, self.keys, n=1)
        return HFTError(f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))

    def typed(self, key: str, value: Any) -> Any:
        """A YAML value as the type of its key, converted and checked as the command line's would be.

        `TrlParser` puts YAML values that are no strings into the dataclasses as they are, whatever their type.
        """
        if key not in self.keys:
            raise self.unknown(key)
        kind = type(value).__name__
        if value is None or isinstance(value, (list, dict)):
            if {"NoneType": "None"}.get(kind, kind) not in self.types[key]:
                raise HFTError(f"{key}: {value!r} is not of type {self.types[key]}")
            return value
        if kind == "str" and re.search(r"\bstr\b", self.types[key]):
            return value  # among them `str | bool`, of which argparse would take the bool only
        flag = str(value).lower() if isinstance(value, bool) else str(value)
        return vars(self.parse_known_args([f"--{key}={flag}"])[0])[key]

    def flags(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Command-line flags as typed values."""
        namespace, rest = self.parse_known_args(list(arguments))
        for word in rest:
            if word.startswith("--"):
                raise self.unknown(word.lstrip("-").partition("=")[0].replace("-", "_"))
            raise HFTError(f"{word!r} belongs to no flag")
        return vars(namespace)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that is a mapping.

    Raises:
        HFTError: it is missing, no YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise HFTError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise HFTError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise HFTError(f"{path} must be a YAML mapping of keys to values")
    return content


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files after `--config`, and the other words."""
    files: list[str] = []
    rest: list[str] = []
    target = rest
    for word in arguments:
        if word.startswith("--"):
            target = files if word == "--config" or word.startswith("--config=") else rest
            if target is files:
                files += [word.removeprefix("--config=")] if "=" in word else []
                continue
        target.append(word)
    return files, rest


def resolve(parser: Parser, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Layer config files and flags, later ones winning.

    Args:
        parser: knows the keys and their types.
        arguments: `--config A.yaml B.yaml --key value ...`.

    Returns:
        All keys that were given with their typed values, those given as flags, and the config files.

    Raises:
        HFTError: an unknown key, a value of the wrong type, or an unreadable file, in one sentence.
    """
    files, words = split_arguments(arguments)
    config: dict[str, Any] = {}
    for path in files:
        content = read_yaml(path)
        if "method" in content:
            config = {key: value for key, value in config.items() if key not in parser.method_keys}
        for key, value in content.items():
            try:
                config[key] = parser.typed(str(key), value)
            except HFTError as error:
                raise HFTError(f"{path}: {error}") from error
    flags = parser.flags(words)
    return config | flags, flags, files


def fill(cls: type[T], config: dict[str, Any]) -> T:
    """A dataclass filled with those keys of a resolved config that are its own.

    Raises:
        HFTError: a value, or a combination of values, that the dataclass refuses.
    """
    try:
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.init and f.name in config})
    except HFTError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise HFTError(" ".join(str(error).split())) from error


def to_yaml(config: dict[str, Any]) -> str:
    """A resolved config as YAML that reads back as itself."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
