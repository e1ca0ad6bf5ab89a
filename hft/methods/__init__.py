"""How parameters change in a run: one file per method, found by its name."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError, reason
from hft.machine import is_sharded, is_zero3
from hft.methods.adapter import Adapter
from hft.methods.schedule import Schedule
from hft.methods.strategy import Strategy
from hft.methods.update import Update
from hft.selection import SelectionConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The key that names a method of each kind, and the kind's base class.
KINDS: dict[str, type] = {"schedule": Schedule, "update": Update, "adapter": Adapter, "strategy": Strategy}
# Values of these keys that name nothing, as earlier configs have them.
NOTHING = (None, "none", "plain")


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
    def shardable(self) -> bool:
        """Whether all of it runs on the shards of FSDP2."""
        return all(part.shardable for part in (self.schedule, self.update, self.adapter, self.strategy) if part)

    def check_args(self, args: TrainingArguments, *, pairs: bool) -> None:
        """Refuse settings of the trainer that the method cannot work with.

        Raises:
            HFTError: there is such a setting.
        """
        check_parts(args, self.schedule, self.update, self.strategy)
        if self.adapter:
            self.adapter.check_args(args, pairs=pairs)


def check_parts(args: TrainingArguments, *parts: Schedule | Update | Strategy | None) -> None:
    """Refuse settings of the trainer that a schedule, an update or a strategy cannot work with.

    Raises:
        HFTError: there is such a setting.
    """
    for part in filter(None, parts):
        if is_sharded(args) and not part.shardable:
            raise HFTError(
                f"{part.kind} {part.name} does not run on the shards of FSDP2; launch with recipes/accelerate/ddp.yaml"
            )
        if is_zero3(args):
            raise HFTError(
                f"{part.kind} {part.name} does not run under ZeRO-3, which keeps parameters and gradients where only "
                "DeepSpeed reaches them; launch with recipes/accelerate/fsdp2.yaml"
            )
        part.check_args(args)


def method_of(config: Mapping[str, Any]) -> Method:
    """The method that a resolved config describes.

    Raises:
        HFTError: keys that do not go together, a key that is missing, or a value that a method refuses.
    """
    made: dict[str, Any] = {}
    for kind in KINDS:
        if config.get(kind) not in NOTHING:
            made[kind] = _fill(find(kind, config[kind]), config, f"{kind} {config[kind]!r}")
    if "adapter" in made:
        others = [f.name for f in fields(SelectionConfig)] + ["schedule", "update"]
        if given := [name for name in others if name in config and config[name] not in NOTHING]:
            raise HFTError(
                f"{given[0]} is about weights of the model, and adapter {config['adapter']!r} freezes all of them; "
                "remove one"
            )
    if (strategy := made.get("strategy")) and strategy.takes_adapter != ("adapter" in made):
        wanted = "needs an adapter, such as lora" if strategy.takes_adapter else "does not work with an adapter"
        raise HFTError(f"strategy {strategy.name} {wanted}; adapters learn one task after another with strategy lora")
    return Method(_fill(SelectionConfig, config, "selection"), **made)


def _fill(cls: type, config: Mapping[str, Any], what: str) -> Any:
    given = {f.name: config[f.name] for f in fields(cls) if f.init and config.get(f.name) is not None}
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise HFTError(f"{what} needs {missing[0]}; give it")
    try:
        return cls(**given)
    except HFTError:
        raise
    except (TypeError, ValueError) as error:
        raise HFTError(f"{what}: {reason(error)}") from error


def classes_of(config: Mapping[str, Any]) -> tuple[type, ...]:
    """The classes whose fields are keys of a config beside the selection's: those of the methods it names.

    Raises:
        HFTError: a method of that name was not found.
    """
    return tuple(find(kind, config[kind]) for kind in KINDS if config.get(kind) not in NOTHING)


def find(kind: str, name: str) -> type:
    """The class of a method.

    Args:
        kind: `schedule`, `update`, `adapter` or `strategy`.
        name: of a built-in one, or FILE.py:CLASS for one's own (docs/new-method.md).

    Raises:
        HFTError: it was not found, or is of another kind.
    """
    path, colon, class_name = str(name).rpartition(":")
    if colon:
        if not (Path(path).is_file() and path.endswith(".py")):
            raise HFTError(f"{kind} {name}: {path} is not a Python file")
        cls = getattr(_module_of(path), class_name, None)
        if not (isinstance(cls, type) and issubclass(cls, KINDS[kind])):
            raise HFTError(f"{kind} {name}: {path} has no class {class_name} that extends {KINDS[kind].__name__}")
        cls.name = str(name)
        return cls
    module, package = str(name).replace("-", "_"), _package_of(kind)
    cls = getattr(import_module(f"{package}.{module}"), "METHOD", None) if module in _modules(package) else None
    if cls and cls.name == name and cls.kind == kind:
        return cls
    known = [cls.name for cls in all_classes() if cls.kind == kind]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, or FILE.py:CLASS of your own"
    raise HFTError(f"{kind}: unknown {kind} {name!r}, {hint}")


def _module_of(path: str) -> ModuleType:
    """A file of the user's own as a module. Dataclasses look their annotations up in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(str(Path(path).resolve()), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def all_classes() -> list[type]:
    """The class of every built-in method: that which a module of its kind's package has as `METHOD`."""
    packages = dict.fromkeys(map(_package_of, KINDS))
    modules = [import_module(f"{package}.{name}") for package in packages for name in _modules(package)]
    return [module.METHOD for module in modules if hasattr(module, "METHOD")]


def _package_of(kind: str) -> str:
    """Where the built-in methods of a kind are: here, unless its base class says otherwise."""
    return getattr(KINDS[kind], "package", __name__)


def _modules(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(import_module(package).__path__)]


def owners_of(key: str) -> str:
    """The built-in methods that have a key, such as `schedule badam, lisa`; empty if there are none."""
    owners = [cls for cls in all_classes() if key in {f.name for f in fields(cls)}]
    return f"{owners[0].kind} {', '.join(cls.name for cls in owners)}" if owners else ""
