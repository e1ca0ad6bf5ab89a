"""What is scored, and how: the benchmarks of each suite, lm-eval's other tasks, and the settings they run under."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hft.config import PositiveInt, option, read_yaml
from hft.errors import HFTError, did_you_mean, neighbor
from hft.userfile import file_digest

# Whose prompts and rules a suite has.
PROTOCOLS = {"quick": "hft", "general": "open-instruct", "knowledge": "lm-eval", "recent": "opencompass"}
# Metrics that are not percentages; of these, less is better.
METRIC_UNITS = {"loss": "nats/token", "kl": "nats/token", "choice_loss": "nats/question"}
LM_EVAL = "lm_eval"  # the suite under which scores of tasks in no other suite are saved
# What lm-eval's files define: a name after `task`, `group` or `tag`, or tags. It would parse all 14,000 files itself.
NAMES = re.compile(r"^(?:task|group|tag):[ \t]*([\"'\w.\-]+)[ \t]*$|^tag:[ \t]*((?:\n[ \t]*- .+)+)", re.MULTILINE)
Dtype = Literal["bfloat16", "float16", "float32", "auto"]


@dataclass(frozen=True)
class Settings:
    """How a suite is run; the flags of `hft eval`."""

    limit: PositiveInt | None = option("Rows of each task; default: all.")
    paper_subsets: bool = option("GSM8K 200 rows, BBH 40 per task, TyDiQA 100 per language.", False)
    tasks: list[str] = option("Benchmarks, lm-eval's tasks (NAME:METRIC) or YAML files.", [])
    max_gen_toks: PositiveInt | None = option("Maximum tokens per answer; default: the task's.")
    chat: bool | None = option("Use the chat template; default: if there is one, except in quick.")
    dtype: Dtype | None = option("Of the model; default: bfloat16 on GPUs, else float32.")
    batch_size: PositiveInt = option("Rows per forward pass.", 8)
    backend: str = option("lm-eval's engine, hf or vllm.", "hf")
    backend_args: dict[str, Any] = option("Further engine arguments, as JSON.", {})
    base: str | None = option("What the models were tuned from; default: by manifest.")
    task_data: str | None = option("A run with held-out rows, for models without any.")
    data: str | None = option("Folder of JSON Lines files to score on, instead of the Hub.")
    allow_code: bool = option("Run generated code (HumanEval, MBPP).", False)
    log_samples: bool = option("Keep each row's outcome, in scores/.", True)

    def __post_init__(self):
        for key, path in (("data", self.data), ("task_data", self.task_data)):
            if path and not Path(path).exists():
                raise HFTError(f"{key} {path} does not exist{neighbor(Path(path))}")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite."""

    name: str  # under which its scores are saved
    task: str  # the lm-eval task or group
    # By name lm-eval's key, `metric,filter`; the first is the benchmark's score. Empty: all that lm-eval computes.
    metrics: Mapping[str, str] = field(default_factory=dict)
    only: str | None = None  # the metric that was asked for, of all that lm-eval computes
    folders: Sequence[str] = ()  # below `lm_eval/tasks`, those that hold the task; none for a task of ours
    num_fewshot: int | None = None  # examples in the prompt; None for the task's own number
    paper_rows: int | None = None  # rows of each subtask where the HFT paper's evaluation takes a subset
    parts: Mapping[str, str] = field(default_factory=dict)  # subtasks whose scores are saved too, by our name
    has_chat_task: bool = False  # under a chat template its prompt is another: that of the task TASK_chat
    turns: bool = False  # under a chat template the examples are turns, not one user message
    instruction: str | None = None  # what the prompt starts with, before what the task says
    draws_example: bool = False  # as open-instruct for TyDiQA
    runs_code: bool = False
    rendered: bool = False  # whether its prompts are rendered by a chat template already
    spec: dict[str, Any] | None = None  # its config as lm-eval takes it, where it differs from the task's
    # With `--data`:
    files: Mapping[str, str] = field(default_factory=dict)  # by split the file of its rows; the first is scored
    member: str | None = None  # the task of the group that a row belongs to, by the row's fields
    differ: Mapping[str, Any] = field(default_factory=dict)  # what differs from the task, as the rows do


SUITES = {
    suite: tuple(Benchmark(name, **keys) for name, keys in benchmarks.items())
    for suite, benchmarks in read_yaml(Path(__file__).with_name("suites.yaml")).items()
}


def find_task(word: str) -> Benchmark:
    """The task that a word of `--tasks` names, as NAME, NAME:METRIC or the path of a YAML file."""
    path, colon, metric = word.partition(":")
    if path.endswith((".yaml", ".yml")):
        if not Path(path).is_file():
            raise HFTError(f"task file {path} does not exist")
        name = Path(path).stem + colon + metric
        groups = re.findall(r"^group: *(\S+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
        folders = (str(Path(path).parent.resolve()),) if groups else ()  # where lm-eval finds its members
        return Benchmark(name, groups[0] if groups else path, only=metric or None, folders=folders)
    files = _files()
    if path not in files:
        known = [*files, *(benchmark.name for suite in SUITES.values() for benchmark in suite)]
        hint = did_you_mean(path, known, "; `lm-eval ls tasks` lists them")
        raise HFTError(f"lm-eval has no task {path!r}{hint}")
    folders = tuple(dict.fromkeys(str(file.parent) for file in files[path]))
    return Benchmark(word, path, only=metric or None, folders=folders)


def own_files(benchmark: Benchmark) -> dict[str, str]:
    """SHA-256 of the files beside a task file of the user's own, which it may include or import."""
    path, shipped = Path(benchmark.task), Path(find_spec("lm_eval").origin).parent
    folders = [path.parent] if path.suffix in (".yaml", ".yml") else [shipped / folder for folder in benchmark.folders]
    files = sorted(file for folder in folders if not folder.is_relative_to(shipped) for file in folder.iterdir())
    return {file.name: file_digest(file) for file in files if file.suffix in (".yaml", ".yml", ".py")}


@functools.cache
def _files() -> dict[str, list[Path]]:
    """The files of lm-eval that define each task, group or tag."""
    found: dict[str, list[Path]] = {}
    for path in sorted((Path(find_spec("lm_eval").origin).parent / "tasks").rglob("*.yaml")):
        for one, several in NAMES.findall(path.read_text(encoding="utf-8")):
            for name in [one] if one else re.findall(r"- +([^\s#:]+)", several):
                found.setdefault(name.strip("\"'"), []).append(path)
    return found
