"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from hft.config import read_yaml
from hft.errors import HFTError
from hft.evaluation.suites import Benchmark
from hft.jsonl import read_jsonl

Rows = list[dict[str, Any]]
TASK_FOLDER = Path(__file__).with_name("tasks")

Texts = Annotated[list[str], Field(min_length=1)]
TYPES = {  # of files.yaml
    "text": str,
    "text if any": NotRequired[str],
    "texts": Texts,
    "four texts": Annotated[list[str], Field(min_length=4, max_length=4)],
    "index of four": Annotated[int, Field(ge=0, le=3)],
    "targets": TypedDict("Targets", {"choices": Texts, "labels": list[Literal[0, 1]]}),
    "mappings": list[dict[str, Any]],
    "anything": Any,
}


def as_dataset(**splits: Rows) -> Callable[..., Any]:
    """The rows as lm-eval's `custom_dataset` takes them: a function of any keywords that returns a DatasetDict."""
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    return lambda **_: dataset


def on_rows(tasks: Mapping[str, Mapping[str, Rows]], group: str | None = None, **more: Any) -> dict[str, Any]:
    """lm-eval's tasks on other rows, by split, in a group, since only a task inside one may differ from its YAML.

    `group` is ours that the tasks belong to, whose keys hold for all; `more` are others that differ from the YAML.
    """
    content = _read_yaml(next(TASK_FOLDER.glob(f"*/{group.removeprefix('hft_')}.yaml"))) if group else {}
    differ = {member["task"]: member for member in content.get("task", ()) if isinstance(member, dict)}
    more |= {"training_split": None}
    members = [
        {"task": task, **differ.get(task, {}), "custom_dataset": as_dataset(**splits), **more}
        for task, splits in tasks.items()
    ]
    # lm-eval 0.4.13 hands all keys of the outermost group to its tasks, which know no aggregate_metric_list.
    return {"group": "local", "task": [{**content, "group": "rows", "task": members}] if group else members}


def _read_yaml(path: Path) -> dict[str, Any]:
    """One of our tasks or groups, as lm-eval reads it."""
    from lm_eval.utils import import_function

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", partial(import_function, yaml_path=path))
    content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    included = content.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        content = _read_yaml(path.parent / name) | content
    return content


def local_spec(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """The task or group of a benchmark, on the rows of a folder; None if the folder has none of it.

    docs/evaluation.md lists the files and their fields. Prompts, shots, filters and metrics are the task's.
    """
    files = {split: folder / f"{name}.jsonl" for split, name in benchmark.files.items()}
    if not files or not all(path.exists() for path in files.values()):
        return None
    tasks: dict[str, dict[str, Rows]] = {}
    for split, path in files.items():
        for row in read_rows(path):
            task = (benchmark.member or benchmark.task).format(**row)
            tasks.setdefault(task, {}).setdefault(split, []).append(row)
    tasks = {task: splits for task, splits in tasks.items() if next(iter(files)) in splits}
    return on_rows(tasks, benchmark.task if benchmark.member else None, **benchmark.differ)


def read_rows(path: Path) -> Rows:
    """The rows of a file of a benchmark, with the fields that are read of it in their types."""
    fields = read_yaml(Path(__file__).with_name("files.yaml"))[path.stem]
    row = TypedDict(path.stem, {name: TYPES[kind] for name, kind in fields.items()})
    rows = read_jsonl(path)
    try:
        return TypeAdapter(list[row]).validate_python(rows)
    except ValidationError as error:
        number, *field = error.errors()[0]["loc"]
        where = f"{path}, row {number} (the first is 0), {'.'.join(map(str, field))}"
        raise HFTError(f"{where}: {error.errors()[0]['msg']}") from None
