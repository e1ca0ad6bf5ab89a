"""The config of a sequence: which tasks in which order, with which strategy; and the runs that it comes to."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from hft.config import TURNS, Given, Keys, fill, option, read_arguments
from hft.continual.metrics import TRACE, metrics_of
from hft.errors import HFTError
from hft.methods.strategy import Row, Strategy
from hft.planning.forecast import Machine
from hft.runs.config import Config, check_shared, groups_of_keys, resolve_config, run_name

PER_RUN = {"dataset_name", "output_dir", "run_name", "round", "strategy_data", "previous_run"}  # set by each run
UNNAMED = ("strategy", "trace_dir", "score_batch_size")  # keys that do not name a sequence
# What a pass of one epoch over few rows does not take from the rounds: their length, and rows held out to choose by.
REPLAY_PASS = {"num_train_epochs": 1.0, "max_steps": -1, "warmup_steps": 0, "eval_strategy": "no"}
REPLAY_PASS |= {"eval_on_start": False, "load_best_model_at_end": False, "save_strategy": "no"}
RECIPE_NAME = "recipe.yaml"  # in the sequence's folder: what all of its runs have in common


@dataclass
class SequenceConfig:
    """The keys of a sequence, beside those of its runs."""

    trace_dir: str | None = option("TRACE's folder, or one like it: TASK/train.json and TASK/test.json, or .jsonl.")
    tasks: list[str] = option("The tasks, in the order in which they are learned.", list(TRACE))
    epochs: dict[str, Annotated[float, Field(gt=0)]] | None = option("Epochs per task; else num_train_epochs.")
    metrics: dict[str, str] | None = option("Metric of each task outside TRACE, as {TASK: accuracy}.")
    strategy: str = option("Continual-learning strategy: a name, or FILE.py:CLASS of your own.", "seqft")
    alignment: str | None = option("Folder in trace_dir with general instructions that replay trains on too.")
    max_prompt_length: PositiveInt = option("Longest prompt in tokens; a longer one is cut.", 1024)
    max_answer_length: Annotated[int, Field(ge=2)] = option("Longest answer in tokens, and most to generate.", 512)
    score_start: bool = option("Score the base before the first round.", True)
    score_unseen: bool = option("Score the tasks that are still to come, too.", False)
    test_rows: PositiveInt | None = option("Test rows of each task; by default all.")
    score_batch_size: PositiveInt = option("Prompts per batch.", 16)

    def __post_init__(self):
        if twice := [task for task in self.tasks if self.tasks.count(task) > 1]:
            raise HFTError(f"tasks has {twice[0]} twice; a task is learned once")
        if not self.tasks:
            raise HFTError(f"tasks is empty; name some, such as {', '.join(TRACE)}")
        for key in ("epochs", "metrics"):
            if others := [task for task in getattr(self, key) or () if task not in self.tasks]:
                raise HFTError(f"{key} has {others[0]}, which is not among the tasks {', '.join(self.tasks)}")
        self.metrics = metrics_of(self.tasks, self.metrics or {})


@dataclass(frozen=True)
class SequenceRun:
    name: str  # of its folder, such as `02-FOMC` or `02-FOMC-replay`
    flags: dict[str, Any]  # its keys besides `recipe.yaml`
    rows: list[Row]  # that it trains on
    memory: list[Row]  # the rows of its `strategy_data`, if any


@dataclass(frozen=True)
class SequencePlan:
    """A sequence as it was asked for."""

    settings: SequenceConfig
    strategy: Strategy
    common: dict[str, Any]  # what all runs have in common, the content of `recipe.yaml`
    keys: dict[str, Any]  # all keys of the sequence and its runs, the content of `sequence.yaml`
    out: Path
    first_round: int  # above 1 if the base has been through rounds before
    dry_run: bool

    @property
    def name(self) -> str:
        return self.keys["run_name"]

    def data(self, name: str) -> Path:
        return self.out / "data" / f"{name}.jsonl"

    def run(
        self, number: int, previous: str | None, rows: list[Row], memory: list[Row], *, replay: bool = False
    ) -> SequenceRun:
        """A run of a round, counted from 0: that on its task, or the replay pass after it."""
        task, adapts = self.settings.tasks[number], self.strategy.takes_adapter
        name, start = f"{number + 1:02}-{task}{'-replay' if replay else ''}", previous and str(self.out / previous)
        flags = {
            "model_name_or_path": None if adapts else start,
            "dataset_name": str(self.data(name)),
            "num_train_epochs": (self.settings.epochs or {}).get(task),
            "round": None if adapts else self.first_round + number,  # an adapter selects nothing
            "previous_run": start if adapts else None,
            "strategy_data": str(self.data(f"{name}-memory")) if memory and self.strategy.acts_on_steps else None,
            "output_dir": str(self.out / name),
            "run_name": f"{self.name}-{name}",
        } | (REPLAY_PASS if replay else {})
        return SequenceRun(name, {key: value for key, value in flags.items() if value is not None}, rows, memory)

    def config(self, flags: dict[str, Any]) -> Config:
        return resolve_config("sft", Given([str(self.out / RECIPE_NAME)], [self.common], dict(flags)))

    def command(self, run: SequenceRun) -> str:
        words = [word for key, value in run.flags.items() for word in (f"--{key}", str(value))]
        return shlex.join(["hft", "sft", "--config", str(self.out / RECIPE_NAME), *words])


def parse_sequence(arguments: Sequence[str]) -> tuple[SequencePlan, Machine]:
    """A sequence, and the machine that it is to be planned for: keys are those of the sequence, or of its runs."""
    description = "Fine-tune on one task after another, and score all after each: a recipe, a method, and flags."
    groups = {"sequence": (SequenceConfig,), "plan, with --dry_run true": (Machine,), **groups_of_keys()}
    machine, given = read_arguments(arguments, "hft continual", description, groups).take(Machine)
    own, rest = given.split(SequenceConfig)
    values, flags = own.resolve(Keys((SequenceConfig,)))
    if "num_train_epochs" in rest.flags and "epochs" not in flags:  # a flag wins over a file
        values.pop("epochs", None)
    for key in {"epochs", "metrics"} - flags.keys() if "tasks" in flags else ():  # the recipe's are of its tasks
        values[key] = {task: value for task, value in (values.get(key) or {}).items() if task in values["tasks"]}
    settings = fill(SequenceConfig, values)
    merged, _ = rest.merge()
    ours = ("dataset_name", "strategy_data", "previous_run", *TURNS)
    if set_by_us := [key for key in ours if merged.get(key, TURNS.get(key)) != TURNS.get(key)]:
        raise HFTError(f"{set_by_us[0]} is set by hft continual per run; remove it, and name tasks and trace_dir")
    names = {"strategy": settings.strategy, "dataset_name": "-", "run_name": merged.get("run_name") or "-"}
    config = resolve_config("sft", replace(rest, flags=rest.flags | names))
    check_shared(config.values)
    if "epochs" in flags and (steps := config.values.get("max_steps", -1)) > 0:
        raise HFTError(f"epochs change nothing beside max_steps {steps}; add --max_steps -1")

    # A sequence is named after its folder if one is given, else after recipe, method, strategy and flags.
    method = f"{config.run.method or 'hft'}-{settings.strategy.rpartition('/')[2].replace(':', '_')}"
    naming = {"method": method, "model_name_or_path": config.run.model_name_or_path}
    flags = {key: value for key, value in given.flags.items() if key not in UNNAMED}
    name = merged.get("run_name") or run_name("trace", naming, flags, given)
    folder, strategy, dropped = config.values["output_dir"], config.method.strategy, PER_RUN
    out = f"runs/{name}" if folder == "runs/-" else folder
    if not (strategy.acts_on_steps or strategy.carry_moments):
        dropped = dropped | {"strategy", *(f.name for f in fields(strategy))}
    common = {"max_length": settings.max_prompt_length + settings.max_answer_length} | config.values | TURNS
    common = {key: value for key, value in common.items() if key not in dropped}
    mine, unsaved = asdict(settings) | asdict(strategy), PER_RUN | {"score_batch_size"}
    mine = {key: value for key, value in mine.items() if value is not None and key not in unsaved}
    first = {key: value for key, value in config.values.items() if key == "round" and key in merged}
    keys = common | mine | first | {"output_dir": out, "run_name": name}
    if machine.gpus and not config.run.dry_run:
        raise HFTError("gpus is for a plan: add --dry_run true")
    first_round = config.values.get("round", 1)
    return SequencePlan(settings, strategy, common, keys, Path(out), first_round, config.run.dry_run), machine
