"""The config of `hft cpi`: tasks, what each stage does, and the folders that the stages share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from hft.config import Given, Keys, Percent, RunConfig, fill, option, read_arguments
from hft.errors import HFTError
from hft.evaluation.suites import SUITES, Settings
from hft.objectives import find_objective
from hft.runs.config import check_is_a_model, check_shared, name_of

# Keys of a single run that the stages set themselves.
SET_BY_STAGES = ("prompt", "completion", "schedule", "update", "adapter", "run_name", "resume_from_checkpoint")
STAGES = ("probe", "group", "fuse", "train", "score")
HELP = f"Core parameter isolation (CPI-FT). Name one stage of {', '.join(STAGES)}, or all run."
CORE_NAME = "core.json"  # in the folder of a core, beside its masks


@dataclass(frozen=True)
class Task:
    """Where the rows of a task come from, and the probe of it if there is one already."""

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    prompt: str | None = None  # jinja2 template of the user's turn, where a row is not a conversation yet
    completion: str | None = None  # the same of the assistant's turn
    benchmark: str | None = None  # of `hft eval`, which scores the task beside its held-out loss
    probe: str | None = None  # a model that was fine-tuned on the task alone, instead of the run of stage 1
    group: str | None = None  # tasks with the same one form a group (given grouping)

    @classmethod
    def of(cls, name: str, keys: Mapping[str, Any]) -> "Task":
        if not re.fullmatch(r"[\w.-]+", name):
            raise HFTError(f"task {name!r}: folders are named after it, so give it letters, digits, '.', '-' and '_'")
        values = typed(f"task {name}", keys, cls)
        if "dataset_name" not in values:
            raise HFTError(f"task {name}: dataset_name is needed")
        fill(RunConfig, values)  # whose checks are a task's too
        if benchmark := values.get("benchmark"):
            suite_of(benchmark)
        return fill(cls, values)


@dataclass
class CPIConfig:
    """What `hft cpi` does in its stages; all other keys are those of `hft sft` and hold for every run."""

    tasks: dict[str, dict[str, Any]] | None = option("Tasks by name, each with dataset_name and other keys of `Task`.")
    percent: Percent = option("p: size of a core in percent of all elements of the model.", 1.0)
    probe: dict[str, Any] | None = option("Keys of `hft sft` that differ in the probes, e.g. {max_steps: 100}.")
    grouping: Literal["similarity", "together", "random", "given"] = option(
        "similarity: tasks whose cores overlap; together: one group; random: three; given: by the group of each task.",
        "similarity",
    )
    tau: float = option("Smallest Jaccard similarity of cores at which tasks are joined.", 0.1)
    order: list[str] | None = option("Tasks in the order in which their groups train; by default draw_seed draws it.")
    draw_seed: int = option("Seed of the order of the groups, of random groups and cores, and of the sample.", 0)
    fusion: bool = option("Fuse the probes before the groups train; without it: DPI.", True)
    freeze: Literal["cores", "random-cores", "all-but-own-cores", "half", "nothing"] = option(
        "What does not train in a group: cores of earlier groups; as many random elements (in the fusion too); all but "
        "its own cores (LoTA); HFT's random half, a new one per group; or nothing.",
        "cores",
    )
    sample_rows: PositiveInt | None = option("Rows of each task that the groups train on; by default all.")
    train: dict[str, Any] | None = option("Keys of `hft sft` that differ in the training of the groups.")
    eval: dict[str, Any] | None = option("Flags of `hft eval` for the tasks' benchmarks, e.g. {limit: 200}.")
    probe_dir: str | None = option("Folder of stage 1, shared by runs with other settings of the later stages.")

    @property
    def needs_cores(self) -> bool:
        return self.fusion or self.grouping == "similarity" or self.freeze not in ("half", "nothing")


@dataclass(frozen=True)
class CPIPlan:
    """A resolved config of `hft cpi`, and its folders."""

    values: dict[str, Any]  # every key that was given or has a default of ours, typed; what `config.yaml` holds
    config: CPIConfig  # those of the stages
    tasks: dict[str, Task]
    sft: dict[str, Any]  # the keys that every run shares
    out: Path  # folder of the stages after the first
    probes: Path  # folder of the first stage

    @property
    def base(self) -> str:
        return self.values["model_name_or_path"]

    @property
    def revision(self) -> str | None:
        return (self.values.get("model_init_kwargs") or {}).get("revision")

    @property
    def stages(self) -> list[str]:
        """The stages that lead to the final model and its scores."""
        skipped = {"probe": not self.config.needs_cores, "fuse": not self.config.fusion}
        return [stage for stage in STAGES if not skipped.get(stage)]

    def data_of(self, task: str) -> Path:
        return self.probes / "data" / task

    def probe_of(self, task: str) -> Path:
        return Path(self.tasks[task].probe or self.probes / "runs" / task)

    def core_of(self, task: str, *, random: bool = False) -> Path:
        """The folder of a task's core, or of as many random elements."""
        return self.probes / "cores" / f"{task}-{self.config.percent:g}%{'-random' if random else ''}"

    def cores(self, tasks: Sequence[str], *, random: bool = False) -> list[str]:
        """The folders of the tasks' cores, which must be there."""
        folders = [self.core_of(task, random=random) for task in tasks]
        if missing := [folder for folder in folders if not (folder / CORE_NAME).exists()]:
            raise HFTError(f"core {missing[0]} not found: run `hft cpi probe` first")
        return [str(folder) for folder in folders]


def parse_stages(arguments: Sequence[str]) -> CPIPlan:
    """The plan of a command line: `--config RECIPE.yaml [ARM.yaml] [--key value ...]`."""
    classes: dict[str, tuple[type, ...]] = {"CPI-FT": (CPIConfig,), "every run": (RunConfig,)}
    if {"-h", "--help"} & set(arguments):
        classes["TRL and transformers"] = (find_objective("sft").config,)
    return plan_stages(read_arguments(arguments, "hft cpi", HELP, classes))


def plan_stages(given: Given) -> CPIPlan:
    """Type and check all keys, and name the folders."""
    of_run = (RunConfig, find_objective("sft").config)
    values, flags = given.resolve(Keys((CPIConfig, *of_run)))
    if wrong := [key for key in values if key in SET_BY_STAGES or key.startswith("dataset_")]:
        raise HFTError(f"{wrong[0]} is not for hft cpi, whose stages set it; a dataset belongs in tasks")
    if not values.get("model_name_or_path"):
        raise HFTError("model_name_or_path is needed: give a recipe with --config, or the base as a flag")
    check_is_a_model(values["model_name_or_path"])
    for key, classes in {"probe": of_run, "train": of_run, "eval": (Settings,)}.items():
        values[key] = typed(key, values.get(key), *classes)
    for keys in (values, values["probe"], values["train"]):
        check_shared(keys)
    config = fill(CPIConfig, values)
    tasks = {name: Task.of(name, keys) for name, keys in (config.tasks or {}).items()}
    if len(tasks) < 2:
        raise HFTError(f"hft cpi keeps tasks apart, so it needs at least two of them, got {len(tasks)}")
    if config.order is not None and sorted(config.order) != sorted(tasks):
        raise HFTError(f"order must name each task once ({', '.join(tasks)}), got {', '.join(config.order)}")
    if config.grouping == "given" and (without := [name for name, task in tasks.items() if task.group is None]):
        raise HFTError(f"grouping given needs the group of each task; task {without[0]} has none")
    if "model_name_or_path" in flags and "architecture" not in flags:
        values.pop("architecture", None)  # the recipe's is that of the recipe's model

    own = {f.name for f in fields(CPIConfig)}
    arm = [values["method"]] if values.get("method") else []
    values.setdefault("output_dir", f"runs/{name_of(values, flags, given.files, 'cpi', *arm)}")
    probes = config.probe_dir or f"{values['output_dir']}/probes"
    if not config.probe_dir and "output_dir" not in flags and given.files:
        of_probes = {key: value for key, value in flags.items() if key not in own - {"tasks", "probe"}}
        probes = f"runs/{name_of(values, of_probes, given.files, 'cpi', 'probes')}"
    sft = {key: value for key, value in values.items() if key not in own | {"method", "output_dir", "dry_run"}}
    return CPIPlan(values, config, tasks, sft, Path(values["output_dir"]), Path(probes))


def typed(where: str, keys: Mapping[str, Any] | None, *classes: type) -> dict[str, Any]:
    """A mapping inside the config with its values as the types of some dataclasses' fields."""
    try:
        return Given([], [], dict(keys or {})).resolve(Keys(classes))[0]
    except HFTError as error:
        raise HFTError(f"{where}: {error}") from error


def suite_of(benchmark: str) -> str:
    suites = {one.name: suite for suite, benchmarks in SUITES.items() for one in benchmarks}
    if benchmark not in suites:
        raise HFTError(f"no suite of hft eval has a benchmark {benchmark!r}; there are {', '.join(suites)}")
    return suites[benchmark]
