"""The rows of the tasks as conversations on disk, and the balanced sample of them that the groups train on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hft.config import RunConfig
from hft.cpi.config import CPIPlan
from hft.cpi.runs import in_main_process, is_current, write_record
from hft.errors import HFTError
from hft.jsonl import read_jsonl, write_jsonl
from hft.machine import say
from hft.selection.policies import sample_names

TRAIN, TEST = "train.jsonl", "test.jsonl"
EVAL_ROWS = 64  # that the loss of a task is measured on, where the config does not say


@in_main_process
def write_task_rows(plan: CPIPlan) -> None:
    """Write the rows of each task to `probes/data/TASK/{train,test}.jsonl`, unless they are there."""
    from hft.data import fingerprint, load_data, sft_rows

    for name, task in plan.tasks.items():
        folder, rows = plan.data_of(name), plan.sft.get("eval_rows") or EVAL_ROWS
        keys = {key: value for key, value in asdict(task).items() if key not in ("probe", "benchmark", "group")}
        made, record = keys | {"eval_rows": rows}, folder.with_name(f"{name}.json")
        given = {key: value for key, value in keys.items() if value is not None}
        try:
            if Path(task.dataset_name).exists():
                made["data"] = fingerprint(task.dataset_name)
            if is_current(record, made):
                continue
            loaded = load_data(RunConfig(**given, eval_rows=rows), sft_rows, evaluate=True)
        except HFTError as error:
            raise HFTError(f"task {name}: {error}") from error
        write_jsonl(folder / TRAIN, as_messages(loaded.train))
        write_jsonl(folder / TEST, as_messages(loaded.test))
        write_record(record, made)
        say(f"task {name}: {len(loaded.train):,} rows, {len(loaded.test):,} held out", *loaded.notes, "")


def as_messages(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Rows of `sft_rows`, all of them as `messages`, so that tasks can be mixed."""
    from hft.data.messages import chat

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
