"""What the stages share: rows of the tasks, runs of `hft sft`, and whether an output is up to date."""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from hft.config import RunConfig
from hft.cpi.config import CPIPlan
from hft.data import fingerprint, load_data, sft_rows
from hft.data.rows import chat
from hft.errors import HFTError
from hft.jsonl import read_jsonl, write_jsonl
from hft.machine import broadcast, is_main, say
from hft.merging.checkpoint import new_folder
from hft.record.manifest import write_json
from hft.runs.config import load_config
from hft.runs.plan import make_plan
from hft.runs.result import CONFIG_NAME
from hft.runs.train import train
from hft.selection.policies import sample_names
from hft.userfile import file_digest

T = TypeVar("T")
TRAIN, TEST = "train.jsonl", "test.jsonl"
EVAL_ROWS = 64  # that the loss of a task is measured on, where the config does not say


def in_main_process(function: Callable[..., T]) -> Callable[..., T]:
    """A function that runs in the first process, and returns its value in every one; the others wait."""

    @functools.wraps(function)
    def run(*args: Any) -> T:
        return broadcast(function(*args) if is_main() else None)

    return run


def write_record(record: Path, settings: Mapping[str, Any], *inputs: Path) -> None:
    """Write an output's JSON, which comes last: settings, and SHA-256 of the files that it was made from."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {**settings, "inputs": list(map(file_digest, inputs))})


def is_current(record: Path, settings: Mapping[str, Any], *inputs: Path) -> bool:
    """Whether an output's JSON holds these settings, and was made from what the files hold now."""
    wanted = {**settings, "inputs": list(map(file_digest, inputs))}
    return record.exists() and wanted.items() <= json.loads(record.read_text()).items()


@contextmanager
def replaced_folder(out: Path, record: str) -> Iterator[Path]:
    """`new_folder`, which replaces what the same stage wrote before: a folder that holds its record."""
    with new_folder(out) as folder:
        yield folder
        if (out / record).exists():
            shutil.rmtree(out)


def train_sft(out: Path, values: Mapping[str, Any], *inputs: Path) -> None:
    """Train or resume a run of `hft sft`, or verify a finished one; refuse one that began from other files."""
    name = "-".join(out.resolve().parts[-3:])  # of the stages' folder, the stage and the run
    plan = make_plan(load_config("sft", **values, output_dir=str(out), run_name=name))
    started = out / "stage.json"
    if started.exists() and not is_current(started, {}, *inputs):
        raise HFTError(f"{out} was trained from rows or a model that have changed since; remove it")
    if is_main():
        write_record(started, {}, *inputs)
    say(f"hft sft --config {out / CONFIG_NAME}", "", *([] if plan.start.is_finished else [plan.report()]))
    if not train(plan).ok:
        raise HFTError(f"verify failed for {out}: see above")


@in_main_process
def write_task_rows(plan: CPIPlan) -> None:
    """Write the rows of each task to `probes/data/TASK/{train,test}.jsonl`, unless they are there."""
    for name, task in plan.tasks.items():
        folder, rows = plan.data_of(name), plan.sft.get("eval_rows") or EVAL_ROWS
        keys = {key: value for key, value in asdict(task).items() if key not in ("probe", "benchmark", "group")}
        made, record = keys | {"eval_rows": rows}, folder.with_name(f"{name}.json")
        given = {key: value for key, value in made.items() if value is not None}
        try:
            if Path(task.dataset_name).exists():
                made["data"] = fingerprint(task.dataset_name)
            if is_current(record, made):
                continue
            loaded = load_data(RunConfig(**given), sft_rows, evaluate=True)
        except HFTError as error:
            raise HFTError(f"task {name}: {error}") from error
        write_jsonl(folder / TRAIN, as_messages(loaded.train))
        write_jsonl(folder / TEST, as_messages(loaded.test))
        write_record(record, made)
        say(f"task {name}: {len(loaded.train):,} rows, {len(loaded.test):,} held out", *loaded.notes, "")


def as_messages(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `sft_rows`, all of them as `messages`, so that tasks can be mixed."""
    for row in rows:
        turns = [("prompt", "user"), ("completion", "assistant")]
        messages = row.get("messages") or [one for key, role in turns for one in chat(row[key], key, role)]
        yield {"messages": messages} | {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}


@in_main_process
def write_sample(plan: CPIPlan, group: Sequence[str], folder: Path) -> Path:
    """Write the rows that a group trains on, unless they are there: as many of each task, drawn by `draw_seed`."""
    wanted, rows, path = plan.config.sample_rows, [], folder / TRAIN
    made = {"tasks": list(group), "sample_rows": wanted, "draw_seed": plan.config.draw_seed}
    record = folder.with_name(f"{folder.name}.json")  # beside the folder, since everything in it is data
    sources = {task: plan.data_of(task) / TRAIN for task in group}
    if is_current(record, made, *sources.values()):
        return path
    for task, source in sources.items():
        every = read_jsonl(source)
        count = min(wanted or len(every), len(every))
        if wanted and count < wanted:
            say(f"NOTE: {task} has {count:,} rows, fewer than sample_rows {wanted:,}; all of them are taken")
        drawn = sample_names(map(str, range(len(every))), count, "sample", plan.config.draw_seed, task)
        rows += [every[index] for index in sorted(map(int, drawn))]
    write_jsonl(path, rows)
    write_record(record, made, *sources.values())
    return path
