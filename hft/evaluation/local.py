"""Rows of the benchmarks from a folder of JSON Lines files, in the place of lm-eval's own data on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hft.errors import HFTError, reason
from hft.evaluation.suites import Benchmark
from hft.machine import say

Row = dict[str, Any]
Rows = Callable[..., Any]  # returns a DatasetDict
OUTER, INNER = "local", "rows"
GROUP = f"{OUTER}::{INNER}"  # lm-eval's name of the inner one


def as_dataset(**splits: list[Row]) -> Rows:
    """The rows as lm-eval asks for them: a function that returns a DatasetDict."""
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    return lambda **_: dataset


def on_rows(tasks: dict[str, Rows], aggregate: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A group of lm-eval's tasks on rows of ours; only a task inside a group may differ from its YAML.

    Args:
        tasks: the rows of each task.
        aggregate: how the group's score follows from the tasks'.
        more: other keys in which the tasks differ from their YAML.
    """
    members = [{"task": task, "custom_dataset": rows, "training_split": None, **more} for task, rows in tasks.items()]
    if aggregate is None:
        return {"group": OUTER, "task": members}
    # lm-eval 0.4.13 hands all keys of the outermost group to its tasks, which know no aggregate_metric_list.
    return {"group": OUTER, "task": [{"group": INNER, "task": members, "aggregate_metric_list": [aggregate]}]}


def local_spec(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """The task or group of a benchmark, on the rows of a folder; None if the folder has none of it.

    The files and their fields are listed in docs/evaluation.md. The prompts, shots, filters and metrics are lm-eval's.

    Raises:
        HFTError: a file cannot be read, or its rows lack a field.
    """
    make = FORMS.get(benchmark.task)
    try:
        return make(folder) if make else None
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise HFTError(f"the rows of {benchmark.name} in {folder} lack the field {error}") from error


def _read(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (UnicodeDecodeError, ValueError) as error:
        raise HFTError(f"{path} is not JSON Lines: {reason(error)}") from error


def _gsm8k(folder: Path) -> dict[str, Any]:
    rows = [{"question": row["question"], "answer": row["answer"]} for row in _read(folder / "gsm8k_test.jsonl")]
    return on_rows({"gsm8k_cot": as_dataset(test=rows)})


def _truthfulqa(folder: Path) -> dict[str, Any]:
    return on_rows({"truthfulqa_mc2": as_dataset(validation=_read(folder / "truthfulqa_mc.jsonl"))})


def _hellaswag(folder: Path) -> dict[str, Any]:
    rows = _read(folder / "hellaswag.jsonl")  # as lm-eval's process_docs leaves them
    return on_rows({"hellaswag": as_dataset(validation=rows)}, process_docs=None)


def _triviaqa(folder: Path) -> dict[str, Any]:
    rows = [
        {"question": row["question"], "answer": {"aliases": row["answers"]}} for row in _read(folder / "triviaqa.jsonl")
    ]
    return on_rows({"triviaqa": as_dataset(validation=rows)})


def _nq_open(folder: Path) -> dict[str, Any]:
    rows = [{"question": row["question"], "answer": row["answers"]} for row in _read(folder / "nq_open.jsonl")]
    return on_rows({"nq_open": as_dataset(validation=rows)})


def _hotpotqa(folder: Path) -> dict[str, Any]:
    rows = [{"question": row["question"], "answer": row["answers"][0]} for row in _read(folder / "hotpotqa.jsonl")]
    return on_rows({"hft_hotpotqa": as_dataset(validation=rows)})


def _humaneval(folder: Path) -> dict[str, Any]:
    return on_rows({"hft_humaneval": as_dataset(test=_read(folder / "humaneval.jsonl"))})


def _mbpp(folder: Path) -> dict[str, Any]:
    test, shots = _read(folder / "mbpp_test.jsonl"), folder / "mbpp_prompt.jsonl"
    if shots.exists():
        return on_rows({"hft_mbpp": as_dataset(test=test, prompt=_read(shots))})
    say(f"mbpp runs without examples in its prompt: {shots} not found")
    zero_shot = {"fewshot_split": None, "fewshot_config": None, "num_fewshot": 0}
    return on_rows({"hft_mbpp": as_dataset(test=test)}, **zero_shot)


def _ifeval(folder: Path) -> dict[str, Any]:
    return on_rows({"ifeval": as_dataset(train=_read(folder / "ifeval.jsonl"))})


def _mmlu(folder: Path) -> dict[str, Any]:
    test, dev = _by("subject", _read(folder / "mmlu_test.jsonl")), _by("subject", _read(folder / "mmlu_dev.jsonl"))
    leaves = {f"mmlu_{subject}": as_dataset(test=rows, dev=dev[subject]) for subject, rows in test.items()}
    return on_rows(leaves, {"metric": "acc", "weight_by_size": True})


def _bbh(folder: Path) -> dict[str, Any]:
    tasks = _by("task", _read(folder / "bbh.jsonl"))
    leaves = {f"bbh_cot_fewshot_{task}": as_dataset(test=rows) for task, rows in tasks.items()}
    return on_rows(leaves, {"metric": "exact_match", "weight_by_size": True, "filter_list": "get-answer"})


def _by(key: str, rows: list[Row]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(row)
    return parts


# By lm-eval's name of the task.
FORMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "mmlu": _mmlu,
    "gsm8k_cot": _gsm8k,
    "bbh_cot_fewshot": _bbh,
    "truthfulqa_mc2": _truthfulqa,
    "hft_humaneval": _humaneval,
    "nq_open": _nq_open,
    "triviaqa": _triviaqa,
    "hft_hotpotqa": _hotpotqa,
    "ifeval": _ifeval,
    "hft_mbpp": _mbpp,
    "hellaswag": _hellaswag,
}
