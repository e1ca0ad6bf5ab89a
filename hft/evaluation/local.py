"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hft.errors import HFTError
from hft.evaluation.suites import Benchmark
from hft.jsonl import read_jsonl
from hft.machine import say

Rows = list[dict[str, Any]]
MakesDataset = Callable[..., Any]  # takes lm-eval's keywords and returns a DatasetDict
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
        return make(*(read_jsonl(path) if path.exists() else None for path in paths))
    except KeyError as error:
        raise HFTError(f"the rows of {benchmark.name} in {folder} lack the field {error}") from error


def _closed_book(task: str, answer: Callable[[list[str]], Any]) -> Callable[[Rows], dict[str, Any]]:
    """A task of questions without a passage; `answer` brings the right answers into its form."""

    def make(rows: Rows) -> dict[str, Any]:
        rows = [{"question": row["question"], "answer": answer(row["answers"])} for row in rows]
        return on_rows({task: as_dataset(validation=rows)})

    return make


def _gsm8k(rows: Rows) -> dict[str, Any]:
    rows = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    return on_rows({"gsm8k_cot": as_dataset(test=rows)})


def _mbpp(test: Rows, prompt: Rows | None) -> dict[str, Any]:
    if prompt is not None:
        return on_rows({"hft_mbpp": as_dataset(test=test, prompt=prompt)})
    say("mbpp runs without examples in its prompt: mbpp_prompt.jsonl not found")
    zero_shot = {"fewshot_split": None, "fewshot_config": None, "num_fewshot": 0}
    return on_rows({"hft_mbpp": as_dataset(test=test)}, **zero_shot)


def _mmlu(test: Rows, dev: Rows) -> dict[str, Any]:
    shots = _by("subject", dev)
    leaves = {f"mmlu_{s}": as_dataset(test=rows, dev=shots[s]) for s, rows in _by("subject", test).items()}
    return on_rows(leaves, {"metric": "acc", "weight_by_size": True})


def _bbh(rows: Rows) -> dict[str, Any]:
    leaves = {f"bbh_cot_fewshot_{task}": as_dataset(test=own) for task, own in _by("task", rows).items()}
    return on_rows(leaves, {"metric": "exact_match", "weight_by_size": True, "filter_list": "get-answer"})


def _by(key: str, rows: Rows) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(row)
    return parts


OPTIONAL = ("mbpp_prompt",)
# By lm-eval's name of the task: the files, and what makes a task of their rows.
FORMS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Any]]]] = {
    "mmlu": (("mmlu_test", "mmlu_dev"), _mmlu),
    "gsm8k_cot": (("gsm8k_test",), _gsm8k),
    "bbh_cot_fewshot": (("bbh",), _bbh),
    "truthfulqa_mc2": (("truthfulqa_mc",), lambda rows: on_rows({"truthfulqa_mc2": as_dataset(validation=rows)})),
    "hft_humaneval": (("humaneval",), lambda rows: on_rows({"hft_humaneval": as_dataset(test=rows)})),
    "nq_open": (("nq_open",), _closed_book("nq_open", list)),
    "triviaqa": (("triviaqa",), _closed_book("triviaqa", lambda answers: {"aliases": answers})),
    "hft_hotpotqa": (("hotpotqa",), _closed_book("hft_hotpotqa", lambda answers: answers[0])),
    "ifeval": (("ifeval",), lambda rows: on_rows({"ifeval": as_dataset(train=rows)})),
    "hft_mbpp": (("mbpp_test", "mbpp_prompt"), _mbpp),
    # The rows are as lm-eval's process_docs leaves them.
    "hellaswag": (
        ("hellaswag",),
        lambda rows: on_rows({"hellaswag": as_dataset(validation=rows)}, process_docs=None),
    ),
}
