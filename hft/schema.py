"""`hft schema`: a JSON schema of recipes for editors, from the dataclasses that read them."""

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Annotated, Any, Union

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypeAliasType, TypedDict  # pydantic wants these below Python 3.12

from hft.config import ALIASES, Keys, RunConfig, help_of
from hft.continual.config import SequenceConfig
from hft.cpi.config import CPIConfig, Task
from hft.evaluation.evaluate import Settings
from hft.merging.config import MergeConfig
from hft.merging.reset import ResetConfig
from hft.methods import all_classes
from hft.objectives import OBJECTIVES, find_objective
from hft.selection import SelectionConfig


def main(arguments: Sequence[str]) -> int:
    """Print the schema of all recipes; each is one of its alternatives."""
    argparse.ArgumentParser(prog="hft schema", description="Print a JSON schema of recipes.").parse_args(arguments)
    print(json.dumps(schema(), indent=1))
    return 0


def schema() -> dict[str, Any]:
    """The schema of a YAML file that `--config` takes. A method's file has keys of a run."""
    methods, run = (SelectionConfig, *all_classes()), (RunConfig, find_objective("sft").config)
    kinds = {name: mapping(name, RunConfig, *methods, find_objective(name).config) for name in OBJECTIVES}
    kinds["trace"] = mapping("trace", SequenceConfig, *run, *methods)
    stages = dict.fromkeys(("probe", "train"), mapping("run", *run)) | {"eval": mapping("eval", Settings)}
    kinds["cpi"] = mapping("cpi", CPIConfig, *run, tasks=dict[str, mapping("task", Task)], **stages)
    kinds["merge"], kinds["reset"] = mapping("merge", MergeConfig), mapping("reset", ResetConfig, SelectionConfig)
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "pydantic"))
    return {"$comment": versions} | TypeAdapter(Union[tuple(kinds.values())]).json_schema()  # noqa: UP007


def mapping(name: str, *classes: type, **types: Any) -> Any:
    """A mapping of some dataclasses' keys and no others, where the first with a name wins; some are of other types."""
    found: dict[str, Any] = {}
    for keys, f in ((Keys((cls,)), f) for cls in classes for f in fields(cls) if f.init):
        kind = types.get(f.name, keys.types[f.name])
        found.setdefault(f.name, described(f.name, kind, help_of(f)))
    found |= {old: found[new] for old, new in ALIASES.items() if new in found}
    return with_config(ConfigDict(extra="forbid", arbitrary_types_allowed=True))(TypedDict(name, found, total=False))


@functools.cache
def described(name: str, kind: Any, text: str) -> Any:
    """A key's type with what it does, once for all that have it."""
    return TypeAliasType(name, Annotated[kind, Field(description=" ".join(text.split()) or None)])
