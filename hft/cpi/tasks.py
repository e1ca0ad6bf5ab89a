"""The rows of the tasks as conversations on disk, and the balanced sample of them that the groups train on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, TemplateError

from hft.config import RunConfig
from hft.cpi.config import Plan, Task
from hft.cpi.runs import is_current
from hft.errors import HFTError, reason
from hft.machine import say
from hft.record.manifest import write_json
from hft.selection.policies import sample_names

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, TEST = "train.jsonl", "test.jsonl"
# Rows that the loss of a task is measured on, where the config does not say.
EVAL_ROWS = 64


def write_tasks(plan: Plan) -> None:
    """Write the rows of each task to `probes/data/TASK/{train,test}.jsonl`, unless they are there.

    Raises:
        HFTError: a task's dataset cannot be read, or has no row to train on.
    """
    from hft.data import load_data, sft_rows

    for name, task in plan.tasks.items():
        folder, rows = plan.data_of(name), plan.sft.get("eval_rows") or EVAL_ROWS
        record = asdict(task) | {"eval_rows": rows, "probe": None, "benchmark": None}
        source = Path(task.dataset_name)
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        if is_current(folder.with_name(f"{name}.json"), record, *files):
            continue
        keys = {key: value for key, value in asdict(task).items() if key.startswith("dataset_")}
        try:
            loaded = load_data(
                RunConfig(**keys, eval_rows=rows),
                lambda dataset, where, task=task: sft_rows(as_conversations(dataset, task), where),
                evaluate=True,
            )
        except HFTError as error:
            raise HFTError(f"task {name}: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / TRAIN, loaded.train)
        write_rows(folder / TEST, loaded.test)
        write_json(folder.with_name(f"{name}.json"), record)
        say(f"task {name}: {len(loaded.train):,} rows, {len(loaded.test):,} held out", *loaded.notes, "")


def as_conversations(dataset: Dataset, task: Task) -> Dataset:
    """Rows as prompt and completion where a task has templates for them; others as they are.

    Raises:
        HFTError: a template is not valid, or names a column that a row does not have.
    """
    if task.prompt is None:
        return dataset
    try:
        environment = Environment(undefined=StrictUndefined, autoescape=False)
        templates = {key: environment.from_string(getattr(task, key)) for key in ("prompt", "completion")}

        def render(row: dict[str, Any]) -> dict[str, str]:
            return {key: template.render(row) for key, template in templates.items()}

        return dataset.map(render, remove_columns=dataset.column_names, desc="rendering rows")
    except TemplateError as error:
        columns = ", ".join(dataset.column_names)
        raise HFTError(f"prompt and completion do not fit the columns {columns}: {reason(error)}") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows of `sft_rows`, one JSON a line, all of them as `messages`, so that tasks can be mixed."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            others = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
            file.write(json.dumps({"messages": messages} | others, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        HFTError: stage 1 has not written it.
    """
    if not path.exists():
        raise HFTError(f"{path} not found: run `hft cpi probe` first")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_sample(plan: Plan, group: Sequence[str], folder: Path) -> None:
    """Write the rows that a group trains on: as many of each task, drawn by `draw_seed`."""
    wanted, rows = plan.config.sample_rows, []
    for task in group:
        every = read_rows(plan.data_of(task) / TRAIN)
        count = min(wanted or len(every), len(every))
        if wanted and count < wanted:
            say(f"NOTE: {task} has {count:,} rows, fewer than sample_rows {wanted:,}; all of them are taken")
        drawn = sample_names(map(str, range(len(every))), count, "sample", plan.config.draw_seed, task)
        rows += [every[index] for index in sorted(map(int, drawn))]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / TRAIN, rows)
