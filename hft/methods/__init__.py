"""How parameters change in a run: one file per method, found by its name."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hft.config import fill
from hft.errors import HFTError, did_you_mean
from hft.machine import is_sharded, is_zero3
from hft.methods.adapter import Adapter
from hft.methods.part import MethodPart
from hft.methods.schedule import Schedule
from hft.methods.strategy import Strategy
from hft.methods.update import Update
from hft.selection import SelectionConfig
from hft.userfile import load_from_file

if TYPE_CHECKING:
    from transformers import TrainingArguments

KINDS: dict[str, type[MethodPart]] = {cls.kind: cls for cls in (Schedule, Update, Adapter, Strategy)}
UNSET = (None, "none")  # YAML can say null, a flag cannot


@dataclass(frozen=True)
class Method:
    """How parameters change in a run: which train, when that changes, how they move; or an adapter instead.

    In a sequence of tasks, a strategy may add to each step.
    """

    selection: SelectionConfig
    schedule: Schedule | None = None
    update: Update | None = None
    adapter: Adapter | None = None
    strategy: Strategy | None = None

    @property
    def parts(self) -> tuple[MethodPart, ...]:
        """Those of schedule, update, adapter and strategy that it has."""
        return tuple(filter(None, (self.schedule, self.update, self.adapter, self.strategy)))

    @property
    def shardable(self) -> bool:
        """Whether all of it runs on the shards of FSDP2."""
        return all(part.shardable for part in self.parts)


def check_parts(args: TrainingArguments, *parts: MethodPart | None, has_reference: bool = False) -> None:
    """Refuse, with an `HFTError`, settings of the trainer that a part of a method cannot work with."""
    for part in filter(None, parts):
        engine = "ZeRO-3" if is_zero3(args) else "FSDP2" if is_sharded(args) else "DDP"
        if engine == "ZeRO-3" or (engine == "FSDP2" and not part.shardable):
            other = "fsdp2" if part.shardable else "ddp"
            raise HFTError(f"{part.kind} {part.name} does not run under {engine}; launch it with --engine {other}")
        if part.acts_around_step and steps_elsewhere(args):
            what = f"{part.kind} {part.name} acts on gradients and weights around the optimizer's step"
            raise HFTError(f"{what}, but {args.optim.value} has no such separate step; set optim to adamw_torch")
        part.check_args(args, has_reference=has_reference)


def steps_elsewhere(args: TrainingArguments) -> bool:
    """Whether the optimizer steps within the backward pass, or keeps the weights that it moves to itself."""
    return any(word in args.optim.value for word in ("layerwise", "lomo", "schedule_free"))


def method_of(config: Mapping[str, Any]) -> Method:
    parts = {cls.kind: _fill(cls, config, f"{cls.kind} {config[cls.kind]!r}") for cls in classes_of(config)}
    adapter, strategy = parts.get("adapter"), parts.get("strategy")
    others = [*(f.name for f in fields(SelectionConfig)), "schedule", "update"]
    if adapter and (given := [name for name in others if config.get(name) not in UNSET]):
        what = f"{given[0]} acts on the model's weights"
        raise HFTError(f"{what}, and adapter {adapter.name!r} freezes all of them; remove one")
    if strategy and strategy.takes_adapter != bool(adapter):
        wanted = "needs an adapter, such as lora" if strategy.takes_adapter else "does not work with an adapter"
        raise HFTError(f"strategy {strategy.name} {wanted}; adapters learn one task after another with strategy lora")
    if strategy and adapter and not adapter.reloads:
        what = f"strategy {strategy.name} starts each round with the adapter of the round before"
        raise HFTError(f"{what}, whose ranks {adapter.name} has pruned; take another adapter, such as lora")
    return Method(_fill(SelectionConfig, config, "selection"), **parts)


def _fill(cls: type, config: Mapping[str, Any], name: str) -> Any:
    given = {key: value for key, value in config.items() if value is not None}
    needed = [f.name for f in fields(cls) if f.init and f.default is f.default_factory is MISSING]
    if missing := [key for key in needed if key not in given]:
        raise HFTError(f"{name} needs {missing[0]}; give it")
    return fill(cls, given)


def classes_of(config: Mapping[str, Any]) -> tuple[type[MethodPart], ...]:
    """The classes whose fields are keys of a config beside the selection's: those of the methods it names."""
    return tuple(find_method(kind, config[kind]) for kind in KINDS if config.get(kind) not in UNSET)


def find_method(kind: str, name: str) -> type[MethodPart]:
    """The class of a built-in method by its name, or of one's own by FILE.py:CLASS."""
    if ":" in name:
        cls, base = load_from_file(name, kind), KINDS[kind]
        if not (isinstance(cls, type) and issubclass(cls, base)):
            path, _, class_name = name.rpartition(":")
            raise HFTError(f"{kind} {name}: {path} has no class {class_name} that extends {base.__name__}")
        cls.name = name
        return cls
    known = {cls.name: cls for cls in all_classes() if cls.kind == kind}
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, f", there are {', '.join(known)}, or FILE.py:CLASS of your own")
    raise HFTError(f"{kind}: unknown {kind} {name!r}{hint}")


@functools.cache
def all_classes() -> list[type[MethodPart]]:
    """The class of every built-in method: the one with a name in each module of its package."""
    found = []
    for package in (__name__, "hft.continual.strategies"):  # which need more than this package may import
        for file in pkgutil.iter_modules(import_module(package).__path__):
            module = import_module(f"{package}.{file.name}")
            classes = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, MethodPart)]
            found += [cls for cls in classes if cls.__module__ == module.__name__ and "name" in vars(cls)]
    return found


def owners_of(key: str) -> str:
    """The built-in methods that have a key, such as `schedule badam, lisa`; empty if there are none."""
    owners = [cls for cls in all_classes() if key in {f.name for f in fields(cls)}]
    return f"{owners[0].kind} {', '.join(cls.name for cls in owners)}" if owners else ""
