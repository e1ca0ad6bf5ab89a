"""The config of a sequence: which tasks in which order, with which strategy; and the runs that it comes to."""

from __future__ import annotations

import importlib
import pkgutil
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hft.config import Given, Keys, RunConfig, fill, read_arguments
from hft.continual import strategies
from hft.continual.tasks import TRACE, metrics_of
from hft.errors import HFTError
from hft.methods import all_classes, find
from hft.methods.strategy import Strategy
from hft.record.manifest import rounds_so_far
from hft.runs.config import Config, resolve_config, run_name
from hft.selection import SelectionConfig

# Keys that each run of a sequence has values of its own for.
PER_RUN = ("dataset_name", "output_dir", "run_name", "num_train_epochs", "round", "strategy_data", "previous_run")
# Keys that do not name a sequence.
UNNAMED = ("strategy", "trace_dir", "score_batch_size", "run_name")
RECIPE_NAME = "recipe.yaml"  # in the sequence's folder: what all of its runs have in common


@dataclass
class SequenceConfig:
    """The keys of a sequence, beside those of its runs."""

    trace_dir: str | None = field(
        default=None,
        metadata={"help": "TRACE's folder, or one like it: TASK/train.json and TASK/test.json, or .jsonl."},
    )
    tasks: list[str] = field(
        default_factory=lambda: list(TRACE), metadata={"help": "The tasks, in the order in which they are learned."}
    )
    order: list[str] | None = field(default=None, metadata={"help": "The same tasks in another order."})
    epochs: dict[str, float] | float | None = field(
        default=None, metadata={"help": "Epochs of each task, or of all; num_train_epochs where a task has none."}
    )
    metrics: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Metric of each task that is not TRACE's, as {TASK: accuracy}."}
    )
    strategy: str = field(
        default="seqft", metadata={"help": "What is done against forgetting: a name, or FILE.py:CLASS of your own."}
    )
    max_prompt_length: int = field(default=1024, metadata={"help": "Longest prompt in tokens; a longer one is cut."})
    max_answer_length: int = field(default=512, metadata={"help": "Longest answer in tokens, and most to generate."})
    score_start: bool = field(default=True, metadata={"help": "Score the base before the first round."})
    score_unseen: bool = field(default=False, metadata={"help": "Score the tasks that are still to come, too."})
    test_rows: int | None = field(default=None, metadata={"help": "Test rows of each task; by default all."})
    score_batch_size: int = field(default=16, metadata={"help": "Prompts that are answered at once."})

    def __post_init__(self):
        if self.order is not None:
            if sorted(self.order) != sorted(self.tasks):
                raise HFTError(f"order must name each of the tasks once: {', '.join(self.tasks)}; or give --tasks")
            self.tasks = self.order
        if twice := [task for task in self.tasks if self.tasks.count(task) > 1]:
            raise HFTError(f"tasks has {twice[0]} twice; a task is learned once")
        if not self.tasks:
            raise HFTError(f"tasks is empty; name some, such as {', '.join(TRACE)}")
        if min(self.max_prompt_length, self.max_answer_length, self.test_rows or 1) < 1 or self.max_answer_length < 2:
            raise HFTError("max_prompt_length and test_rows must be at least 1, and max_answer_length at least 2")
        self.metrics = metrics_of(self.tasks, self.metrics)

    def epochs_of(self, task: str) -> float | None:
        """Epochs of a task; None leaves it to `num_train_epochs`."""
        return self.epochs.get(task) if isinstance(self.epochs, dict) else self.epochs


@dataclass(frozen=True)
class Run:
    """One run of a sequence.

    Attributes:
        name: of its folder, such as `02-FOMC` or `02-FOMC-replay`.
        task: the task of its round.
        flags: what it has beside `recipe.yaml`.
    """

    name: str
    task: str
    flags: dict[str, Any]


@dataclass(frozen=True)
class SequencePlan:
    """A sequence as it was asked for.

    Attributes:
        name: of the sequence.
        out: its folder.
        settings: the keys of the sequence.
        strategy: what is done against forgetting.
        common: what all runs have in common, the content of `recipe.yaml`.
        given_epochs: whether `num_train_epochs` was a flag, which wins over the epochs of the tasks.
        first_round: number of the first round; above 1 if the base has been through rounds before.
    """

    name: str
    out: Path
    settings: SequenceConfig
    strategy: Strategy
    common: dict[str, Any]
    given_epochs: bool
    first_round: int

    def data(self, name: str) -> Path:
        """A file of rows."""
        return self.out / "data" / f"{name}.jsonl"

    def runs_of(self, number: int, previous: str | None, *, remembers: bool, replays: bool) -> list[Run]:
        """The runs of a round.

        Args:
            number: of the round, from 0.
            previous: name of the run before it, or None.
            remembers: whether there are rows for `strategy_data`.
            replays: whether a replay pass follows.
        """
        task = self.settings.tasks[number]
        epochs = None if self.given_epochs else self.settings.epochs_of(task)
        runs = []
        for name in [f"{number + 1:02}-{task}", *([f"{number + 1:02}-{task}-replay"] if replays else [])]:
            flags = {"dataset_name": str(self.data(name)), "num_train_epochs": 1.0 if runs else epochs}
            if previous and not self.strategy.takes_adapter:
                flags = {"model_name_or_path": str(self.out / previous)} | flags
            if not self.strategy.takes_adapter:  # an adapter selects nothing
                flags["round"] = self.first_round + number
            if self.strategy.takes_adapter and previous:
                flags["previous_run"] = str(self.out / previous)
            if self.strategy.acts_on_steps:
                flags["strategy_data"] = str(self.data(f"{name}-memory")) if remembers and not runs else None
            flags |= {"output_dir": str(self.out / name), "run_name": f"{self.name}-{name}"}
            runs.append(Run(name, task, {key: value for key, value in flags.items() if value is not None}))
            previous = name
        return runs

    def config(self, run: Run) -> Config:
        """The config of a run, the same as that of its command."""
        return resolve_config("sft", Given([str(self.out / RECIPE_NAME)], [self.common], dict(run.flags)))

    def command(self, run: Run) -> str:
        """The command that repeats a run by hand."""
        words = [word for key, value in run.flags.items() for word in (f"--{key}", str(value))]
        return shlex.join(["hft", "sft", "--config", str(self.out / RECIPE_NAME), *words])


def parse_sequence(arguments: Sequence[str]) -> tuple[SequencePlan, bool]:
    """The sequence of a command line, and whether to stop once it is printed.

    Raises:
        HFTError: an unknown key or strategy, a value of the wrong type, or keys that exclude each other.
    """
    groups = {
        "sequence": (SequenceConfig,),
        **{f"strategy {cls.name}: {cls.description}": (cls,) for cls in all_strategies()},
        "run": (RunConfig,),
        "selection": (SelectionConfig,),
        **{f"{cls.kind} {cls.name}: {cls.description}": (cls,) for cls in all_classes()},
    }
    description = (
        "Fine-tune on one task after another, and score all of them after each: a recipe, a method, and flags."
    )
    return resolve_sequence(read_arguments(arguments, "hft continual", description, groups))


def resolve_sequence(given: Given) -> tuple[SequencePlan, bool]:
    """Divide keys between the sequence and its runs, and type and check both."""
    own = {f.name for f in fields(SequenceConfig)}
    values, _ = _part(given, own).resolve(Keys((SequenceConfig,)))
    settings = fill(SequenceConfig, values)
    cls = find_strategy(settings.strategy)
    rest = _part(given, own, inside=False)
    dry_run = str(rest.flags.pop("dry_run", "false")).lower() == "true"
    wanted = {"strategy": _target(cls), "dataset_name": "-", "output_dir": rest.flags.get("output_dir", "-")}
    config = resolve_config("sft", Given(rest.files, rest.contents, rest.flags | wanted))

    method = f"{config.run.method or 'hft'}-{_name(settings.strategy)}"
    told = {key: value for key, value in given.flags.items() if key not in UNNAMED}
    name = run_name("trace", {"method": method, "model_name_or_path": config.run.model_name_or_path}, told, given.files)
    out = Path(rest.flags.get("output_dir", f"runs/{name}"))
    common = {"max_length": settings.max_prompt_length + settings.max_answer_length} | config.values
    by_flag = "num_train_epochs" in rest.flags
    dropped = {*PER_RUN} - ({"num_train_epochs"} if by_flag else set())
    if not (cls.acts_on_steps or config.method.strategy.carry_moments):
        dropped |= {"strategy", *(f.name for f in fields(cls))}
    common = {key: value for key, value in common.items() if key not in dropped}
    rounds = rounds_so_far(config.run.model_name_or_path)
    first = rounds[-1]["selection"].get("round", 0) + 1 if rounds else 1
    return SequencePlan(out.name, out, settings, config.method.strategy, common, by_flag, first), dry_run


def _name(strategy: str) -> str:
    """A strategy's name as a part of a folder's."""
    return strategy.rpartition("/")[2].replace(":", "_")


def _part(given: Given, keys: set[str], *, inside: bool = True) -> Given:
    """What was given of some keys, or of all others."""
    contents = [{k: v for k, v in content.items() if (k in keys) is inside} for content in given.contents]
    return Given(given.files, contents, {k: v for k, v in given.flags.items() if (k in keys) is inside})


def all_strategies() -> list[type[Strategy]]:
    """The strategies that come with hft."""
    names = [module.name for module in pkgutil.iter_modules(strategies.__path__)]
    return [importlib.import_module(f"{strategies.__name__}.{name}").STRATEGY for name in names]


def _target(cls: type[Strategy]) -> str:
    """A strategy's class as `hft sft --strategy` takes it."""
    return cls.name if ":" in cls.name else f"{cls.__module__}:{cls.__name__}"


def find_strategy(name: str) -> type[Strategy]:
    """The class of a strategy: one that comes with hft, or FILE.py:CLASS or MODULE:CLASS.

    Raises:
        HFTError: it was not found.
    """
    if ":" in name:
        return find("strategy", name)
    classes = {cls.name: cls for cls in all_strategies()}
    if name not in classes:
        raise HFTError(f"unknown strategy {name!r}, there are {', '.join(classes)}, or FILE.py:CLASS of your own")
    return classes[name]
