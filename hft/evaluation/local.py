"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hft.errors import HFTError
from hft.evaluation.suites import Benchmark
from hft.jsonl import read_jsonl
from hft.machine import say

Rows = list[dict[str, Any]]
MakesDataset = Callable[..., Any]  # takes lm-eval's keywords and returns a DatasetDict
MakesSpec = Callable[..., dict[str, Any]]  # takes the name of a task and the rows of each file
OUTER, INNER = "local", "rows"
GROUP = f"{OUTER}::{INNER}"  # lm-eval's name of the inner one


def as_dataset(**splits: Rows) -> MakesDataset:
    """The rows as lm-eval's `custom_dataset` takes them."""
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    return lambda **_: dataset


def on_rows(tasks: dict[str, MakesDataset], aggregate: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A group of lm-eval's tasks on other rows, since only a task inside a group may differ from its YAML.

    `aggregate` says how the group's score follows from the tasks'; `more` are other keys that differ from the YAML.
    """
    members = [{"task": task, "custom_dataset": rows, "training_split": None, **more} for task, rows in tasks.items()]
    if aggregate is None:
        return {"group": OUTER, "task": members}
    # lm-eval 0.4.13 hands all keys of the outermost group to its tasks, which know no aggregate_metric_list.
    return {"group": OUTER, "task": [{"group": INNER, "task": members, "aggregate_metric_list": [aggregate]}]}


def local_spec(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """The task or group of a benchmark, on the rows of a folder; None if the folder has none of it.

    docs/evaluation.md lists the files and their fields. Prompts, shots, filters and metrics are lm-eval's.
    """
    names, make = FORMS.get(benchmark.task, ((), None))
    paths = [folder / f"{name}.jsonl" for name in names]
    if make is None or not all(path.exists() for path in paths if path.stem not in OPTIONAL):
        return None
    try:
        return make(benchmark.task, *(read_jsonl(path) if path.exists() else None for path in paths))
    except KeyError as error:
        raise HFTError(f"the rows of {benchmark.name} in {folder} lack the field {error}") from error


def _plain(split: str, convert: Callable[[dict[str, Any]], dict[str, Any]] = dict, **more: Any) -> MakesSpec:
    """A task of one file, whose rows are those of a split once they are converted."""
    return lambda task, rows: on_rows({task: as_dataset(**{split: [convert(row) for row in rows]})}, **more)


def _closed_book(answer: Callable[[list[str]], Any]) -> MakesSpec:
    """A task of questions without a passage; `answer` brings the right answers into its form."""
    return _plain("validation", lambda row: {"question": row["question"], "answer": answer(row["answers"])})


def _mbpp(task: str, test: Rows, prompt: Rows | None) -> dict[str, Any]:
    if prompt is not None:
        return on_rows({task: as_dataset(test=test, prompt=prompt)})
    say("mbpp runs without examples in its prompt: mbpp_prompt.jsonl not found")
    zero_shot = {"fewshot_split": None, "fewshot_config": None, "num_fewshot": 0}
    return on_rows({task: as_dataset(test=test)}, **zero_shot)


def _mmlu(task: str, test: Rows, dev: Rows) -> dict[str, Any]:
    shots = _by("subject", dev)
    leaves = {f"{task}_{s}": as_dataset(test=rows, dev=shots[s]) for s, rows in _by("subject", test).items()}
    return on_rows(leaves, {"metric": "acc", "weight_by_size": True})


def _bbh(task: str, rows: Rows) -> dict[str, Any]:
    leaves = {f"{task}_{name}": as_dataset(test=own) for name, own in _by("task", rows).items()}
    return on_rows(leaves, {"metric": "exact_match", "weight_by_size": True, "filter_list": "get-answer"})


def _by(key: str, rows: Rows) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(row)
    return parts


OPTIONAL = ("mbpp_prompt",)
# By lm-eval's name of the task: the files, and what makes a task of their rows.
FORMS: dict[str, tuple[tuple[str, ...], MakesSpec]] = {
    "mmlu": (("mmlu_test", "mmlu_dev"), _mmlu),
    "gsm8k_cot": (("gsm8k_test",), _plain("test", lambda row: {key: row[key] for key in ("question", "answer")})),
    "bbh_cot_fewshot": (("bbh",), _bbh),
    "truthfulqa_mc2": (("truthfulqa_mc",), _plain("validation")),
    "hft_humaneval": (("humaneval",), _plain("test")),
    "nq_open": (("nq_open",), _closed_book(list)),
    "triviaqa": (("triviaqa",), _closed_book(lambda answers: {"aliases": answers})),
    "hft_hotpotqa": (("hotpotqa",), _closed_book(lambda answers: answers[0])),
    "ifeval": (("ifeval",), _plain("train")),
    "hft_mbpp": (("mbpp_test", "mbpp_prompt"), _mbpp),
    "hellaswag": (("hellaswag",), _plain("validation", process_docs=None)),  # as lm-eval's process_docs leaves them
}
