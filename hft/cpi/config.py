"""The config of `hft cpi`: tasks, what each stage does, and the folders that the stages share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hft.config import Keys, RunConfig, fill, read_arguments
from hft.errors import HFTError
from hft.evaluation.evaluate import Settings
from hft.evaluation.suites import SUITES
from hft.objectives import find_objective
from hft.runs.config import ALIASES, check_base_is_a_model, name_of

# Keys of a single run that the stages set themselves.
OF_A_STAGE = (
    "dataset_name dataset_config dataset_revision dataset_train_split dataset_test_split schedule update adapter"
)
OF_A_STAGE = (*OF_A_STAGE.split(), "run_name", "resume_from_checkpoint")
STAGES = ("probe", "group", "fuse", "train", "score")
HELP = f"Core parameter isolation (CPI-FT). The first word may be one stage, {', '.join(STAGES)}; by default all run."


@dataclass(frozen=True)
class Task:
    """Where the rows of a task come from, and the probe of it if there is one already.

    Attributes:
        prompt: a jinja2 template of the user's turn over a row's columns, where a row is not a conversation yet.
        completion: the same of the assistant's turn.
        benchmark: what `hft eval` scores it by, beside its held-out loss, e.g. `gsm8k`.
        probe: a model that was fine-tuned on the task alone, in place of the run that stage 1 makes.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    prompt: str | None = None
    completion: str | None = None
    benchmark: str | None = None
    probe: str | None = None

    def __post_init__(self):
        if self.benchmark:
            suite_of(self.benchmark)
        if (self.prompt is None) != (self.completion is None):
            raise HFTError("a task's prompt and completion are templates that belong together; give both")


@dataclass
class CPIConfig:
    """What `hft cpi` does in its stages; all other keys are those of `hft sft` and hold for every run."""

    tasks: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Tasks by name: dataset_name and what else `Task` has (docs/cpi.md)."}
    )
    percent: float = field(default=1.0, metadata={"help": "p: size of a core in percent of all elements of the model."})
    probe: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keys of `hft sft` that differ in the probes, e.g. {max_steps: 100}."}
    )
    grouping: Literal["similarity", "together", "random", "given"] = field(
        default="similarity",
        metadata={
            "help": "similarity: tasks whose cores overlap; together: all tasks in one group; random: as many as "
            "num_groups, drawn by draw_seed; given: given_groups."
        },
    )
    tau: float = field(default=0.1, metadata={"help": "Jaccard similarity of cores from which tasks are joined."})
    num_groups: int | None = field(default=None, metadata={"help": "Number of groups (random grouping)."})
    given_groups: list[list[str]] | None = field(default=None, metadata={"help": "The groups (given grouping)."})
    order: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks in the order in which their groups train; by default draw_seed draws it."},
    )
    draw_seed: int = field(
        default=0, metadata={"help": "Seed of the order of the groups, of random groups and cores, and of the sample."}
    )
    fusion: bool = field(default=True, metadata={"help": "Fuse the probes before the groups train; without it: DPI."})
    backbone: Literal["multi-stage", "base", "mean"] = field(
        default="multi-stage",
        metadata={
            "help": "What the probes are fused into: the model after all groups have trained without fusion, the base, "
            "or the mean of the probes."
        },
    )
    overlap: Literal["mean", "last", "largest"] = field(
        default="mean",
        metadata={
            "help": "The value of an element in several cores: mean of the probes, the last one's in order, or the one "
            "that moved furthest."
        },
    )
    omega: float | None = field(
        default=None,
        metadata={"help": "Weight of each probe that is folded in; by default 1/2, 1/3, ..., so that all count alike."},
    )
    freeze: Literal["cores", "random-cores", "all-but-own-cores", "half", "nothing"] = field(
        default="cores",
        metadata={
            "help": "What a group leaves as it is: cores of earlier groups; random elements, as many, instead (in the "
            "fusion too); all but its own cores (LoTA); HFT's random half, another one for each group; or nothing."
        },
    )
    sample_rows: int | None = field(
        default=None, metadata={"help": "Rows of each task that the groups train on; by default all."}
    )
    train: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keys of `hft sft` that differ in the training of the groups."}
    )
    eval: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the tasks' benchmarks, as flags of `hft eval`, e.g. {limit: 200}."}
    )
    probe_dir: str | None = field(
        default=None, metadata={"help": "Folder of stage 1, which other settings of the later stages share."}
    )

    def __post_init__(self):
        if not 0 <= self.percent <= 100:
            raise HFTError(f"percent must lie in 0..100, got {self.percent:g}")
        if self.omega is not None and not 0 <= self.omega <= 1:
            raise HFTError(f"omega must lie in 0..1, got {self.omega:g}")
        for key, grouping in (("num_groups", "random"), ("given_groups", "given")):
            if getattr(self, key) is None and self.grouping == grouping:
                raise HFTError(f"grouping {grouping} needs {key}; give it")
        if self.sample_rows is not None and self.sample_rows < 1:
            raise HFTError(f"sample_rows must be at least 1, got {self.sample_rows}")

    @property
    def needs_cores(self) -> bool:
        """Whether any stage looks at what the probes found."""
        return self.fusion or self.grouping == "similarity" or self.freeze not in ("half", "nothing")


@dataclass(frozen=True)
class Plan:
    """A resolved config of `hft cpi`, and its folders.

    Attributes:
        values: every key that was given or has a default of ours, typed; what `config.yaml` holds.
        config: those of the stages.
        tasks: by name.
        sft: the keys that every run shares.
        out: folder of the stages after the first.
        probes: folder of the first stage.
    """

    values: dict[str, Any]
    config: CPIConfig
    tasks: dict[str, Task]
    sft: dict[str, Any]
    out: Path
    probes: Path

    @property
    def base(self) -> str:
        """The model that all tasks start from, as the config names it."""
        return self.values["model_name_or_path"]

    def data_of(self, task: str) -> Path:
        """The folder of a task's rows."""
        return self.probes / "data" / task

    def probe_of(self, task: str) -> Path:
        """The model that was fine-tuned on a task alone."""
        return Path(self.tasks[task].probe or self.probes / "runs" / task)

    def core_of(self, task: str, *, random: bool = False) -> Path:
        """The folder of a task's core, or of as many random elements."""
        return self.probes / "cores" / f"{task}-{self.config.percent:g}%{'-random' if random else ''}"


def parse_config(arguments: Sequence[str]) -> Plan:
    """The plan of a command line: `--config RECIPE.yaml [ARM.yaml] [--key value ...]`.

    Raises:
        HFTError: an unknown key, a value of the wrong type, or keys that do not go together.
    """
    classes: dict[str, tuple[type, ...]] = {"CPI-FT": (CPIConfig,), "every run": (RunConfig,)}
    if {"-h", "--help"} & set(arguments):
        classes["TRL and transformers"] = (find_objective("sft").config,)
    given = read_arguments(arguments, "hft cpi", HELP, classes)
    keys = Keys((CPIConfig, RunConfig, find_objective("sft").config), aliases=ALIASES)
    return make_plan(*given.resolve(keys), given.files)


def make_plan(values: dict[str, Any], flags: Mapping[str, Any], files: Sequence[str] = ()) -> Plan:
    """Check a config, and name its folders.

    Args:
        values: all keys, typed.
        flags: those among them that were flags; they are in the folder's name.
        files: the first one is the recipe, whose folder is in the name too.

    Raises:
        HFTError: keys that do not go together, or fewer than two tasks.
    """
    if wrong := [key for key in OF_A_STAGE if key in values]:
        raise HFTError(f"{wrong[0]} is not for hft cpi, whose stages set it; a dataset belongs in tasks (docs/cpi.md)")
    if not values.get("model_name_or_path"):
        raise HFTError("model_name_or_path is needed: give a recipe with --config, or the base as a flag")
    check_base_is_a_model(values["model_name_or_path"])
    for stage in ("probe", "train"):
        values = values | {stage: typed(stage, values.get(stage), RunConfig, find_objective("sft").config)}
    if any(given.get("save_only_trained") for given in (values, values["probe"], values["train"])):
        raise HFTError("each stage starts from the models of the one before; leave out save_only_trained")
    values = values | {"eval": typed("eval", values.get("eval"), Settings)}
    config, own = fill(CPIConfig, values), {f.name for f in fields(CPIConfig)}
    tasks = {name: make_task(name, given) for name, given in (config.tasks or {}).items()}
    if len(tasks) < 2:
        raise HFTError(f"hft cpi keeps tasks apart, so it needs at least two of them, got {len(tasks)}")
    check_tasks_named("order", config.order, tasks)
    if config.grouping == "given":
        check_tasks_named("given_groups", config.given_groups, tasks)
    if config.num_groups is not None and not 1 <= config.num_groups <= len(tasks):
        raise HFTError(f"num_groups must lie in 1..{len(tasks)}, the number of tasks, got {config.num_groups}")
    if "model_name_or_path" in flags and "architecture" not in flags:
        values = {key: value for key, value in values.items() if key != "architecture"}  # it is the recipe's model's

    arm = [values["method"]] if values.get("method") else []
    name = name_of(values, dict(flags), files, "cpi", *arm)
    values = values | {"output_dir": values.get("output_dir", f"runs/{name}")}
    probes = config.probe_dir or f"{values['output_dir']}/probes"
    if not config.probe_dir and "output_dir" not in flags and files:
        of_probes = {key: value for key, value in flags.items() if key not in own - {"tasks", "probe"}}
        probes = f"runs/{name_of(values, of_probes, files, 'cpi', 'probes')}"
    sft = {key: value for key, value in values.items() if key not in own | {"method", "output_dir", "dry_run"}}
    return Plan(values, config, tasks, sft, Path(values["output_dir"]), Path(probes))


def make_task(name: str, given: Mapping[str, Any]) -> Task:
    """A task from its keys in the config.

    Raises:
        HFTError: an unknown key, a value of the wrong type, no dataset, or a name that cannot be a folder's.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise HFTError(f"task {name!r}: a name is letters, digits, '.', '-' and '_', since folders are named after it")
    values = typed(f"task {name}", given, Task)
    if "dataset_name" not in values:
        raise HFTError(f"task {name}: dataset_name is needed")
    return fill(Task, values)


def typed(where: str, given: Mapping[str, Any] | None, *classes: type) -> dict[str, Any]:
    """A mapping inside the config with its values as the types of some dataclasses' fields.

    Raises:
        HFTError: an unknown key or a value of the wrong type, and where.
    """
    keys = Keys(classes, aliases=ALIASES)
    try:
        return {key: keys.convert(ALIASES.get(key, key), value) for key, value in (given or {}).items()}
    except HFTError as error:
        raise HFTError(f"{where}: {error}") from error


def check_tasks_named(key: str, named: Sequence[str] | Sequence[Sequence[str]] | None, tasks: Iterable[str]) -> None:
    """Refuse an order or groups that do not name each task once.

    Raises:
        HFTError: a task is missing, unknown, or named twice.
    """
    if named is None:
        return
    names = [name for entry in named for name in ([entry] if isinstance(entry, str) else entry)]
    if sorted(names) != sorted(tasks):
        raise HFTError(f"{key} must name each task once ({', '.join(tasks)}), got {', '.join(names)}")


def suite_of(benchmark: str) -> str:
    """The suite of `hft eval` that has a benchmark.

    Raises:
        HFTError: none has it.
    """
    for suite, benchmarks in SUITES.items():
        if benchmark in {one.name for one in benchmarks}:
            return suite
    known = ", ".join(one.name for benchmarks in SUITES.values() for one in benchmarks)
    raise HFTError(f"no suite of hft eval has a benchmark {benchmark!r}; there are {known}")
