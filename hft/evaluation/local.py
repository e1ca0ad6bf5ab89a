"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hft.errors import HFTError
from hft.evaluation.suites import Benchmark
from hft.jsonl import read_jsonl
from hft.machine import say

Rows = list[dict[str, Any]]
MakesDataset = Callable[..., Any]  # takes lm-eval's keywords and returns a DatasetDict
MakesSpec = Callable[..., dict[str, Any]]  # takes the name of a task and the rows of each file
TASK_FOLDER = Path(__file__).with_name("tasks")
OUTER, INNER = "local", "rows"
GROUP = f"{OUTER}::{INNER}"  # lm-eval's name of the inner one


def as_dataset(**splits: Rows) -> MakesDataset:
    """The rows as lm-eval's `custom_dataset` takes them."""
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    return lambda **_: dataset


def on_rows(tasks: dict[str, MakesDataset], group: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A group of lm-eval's tasks on other rows, since only a task inside a group may differ from its YAML.

    `group` is the group that the tasks belong to, whose keys hold for all; `more` are others that differ from the YAML.
    """
    differ = {member["task"]: member for member in (group or {}).get("task", ()) if isinstance(member, dict)}
    more |= {"training_split": None}
    members = [{"task": task, **differ.get(task, {}), "custom_dataset": rows, **more} for task, rows in tasks.items()]
    # lm-eval 0.4.13 hands all keys of the outermost group to its tasks, which know no aggregate_metric_list.
    return {"group": OUTER, "task": [{**group, "group": INNER, "task": members}] if group else members}


def read_group(task: str) -> dict[str, Any]:
    """Our YAML of a group, as lm-eval reads it."""
    return _read_yaml(next(TASK_FOLDER.glob(f"*/{task.removeprefix('hft_')}.yaml")))


def _read_yaml(path: Path) -> dict[str, Any]:
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
    names, make = FORMS.get(benchmark.task.removesuffix("_chat"), ((), None))
    paths = [folder / f"{name}.jsonl" for name in names]
    if make is None or not all(path.exists() for path in paths if path.stem not in OPTIONAL):
        return None
    try:
        return make(benchmark.task, *(read_jsonl(path) if path.exists() else None for path in paths))
    except KeyError as error:
        raise HFTError(f"the rows of {benchmark.name} in {folder} lack the field {error}") from error


def _plain(
    split: str, convert: Callable[[dict[str, Any]], dict[str, Any]] = dict, member: str | None = None, **more: Any
) -> MakesSpec:
    """A task of one file, whose rows are those of a split once they are converted; `member` is the one of a group."""

    def make(task: str, rows: Rows) -> dict[str, Any]:
        dataset = as_dataset(**{split: [convert(row) for row in rows]})
        return on_rows({member or task: dataset}, read_group(task) if member else None, **more)

    return make


def _closed_book(answer: Callable[[list[str]], Any]) -> MakesSpec:
    """A task of questions without a passage; `answer` brings the right answers into its form."""
    return _plain("validation", lambda row: {"question": row["question"], "answer": answer(row["answers"])})


def _mbpp(task: str, test: Rows, prompt: Rows | None) -> dict[str, Any]:
    if prompt is not None:
        return on_rows({task: as_dataset(test=test, prompt=prompt)})
    say("mbpp runs without examples in its prompt: mbpp_prompt.jsonl not found")
    zero_shot = {"fewshot_split": None, "fewshot_config": None, "num_fewshot": 0}
    return on_rows({task: as_dataset(test=test)}, **zero_shot)


def _parts(prefix: str, key: str, *splits: str, **more: Any) -> MakesSpec:
    """The tasks of a group, one for each value of a field; each file is one of their splits."""

    def make(task: str, *files: Rows) -> dict[str, Any]:
        parts = [_by(key, rows) for rows in files]
        datasets = {name: {split: part[name] for split, part in zip(splits, parts, strict=True)} for name in parts[0]}
        tasks = {prefix + name: as_dataset(**dataset) for name, dataset in datasets.items()}
        return on_rows(tasks, read_group(task), **more)

    return make


def _gold(row: dict[str, Any]) -> dict[str, Any]:
    return {"query": row["query"], "choices": row["choices"], "gold": row["label"]}


def _question_and_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": row["answer"]}


def _by(key: str, rows: Rows) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(row)
    return parts


OPTIONAL = ("mbpp_prompt",)
MMLU = (("mmlu_test", "mmlu_dev"), _parts("mmlu_", "subject", "test", "dev"))
BBH = (("bbh",), _parts("bbh_cot_fewshot_", "task", "test"))
TYDIQA = (("tydiqa_dev", "tydiqa_train"), _parts("tydiqa_goldp_", "language", "validation", "train", process_docs=None))
GSM8K = ("gsm8k_test",)
QUESTION = _plain("test", lambda row: {"question": row["question"], "answers": row["answers"]}, process_docs=None)
# By the name of the task: the files, and what makes a task of their rows.
FORMS: dict[str, tuple[tuple[str, ...], MakesSpec]] = {
    "hft_mmlu_open_instruct": MMLU,
    "hft_mmlu_opencompass": MMLU,
    "hft_gsm8k_open_instruct": (GSM8K, _plain("test", _question_and_answer, "gsm8k_cot")),
    "hft_gsm8k_opencompass": (GSM8K, _plain("test", _question_and_answer)),
    "hft_bbh_open_instruct": BBH,
    "hft_bbh_opencompass": BBH,
    "hft_tydiqa_open_instruct": TYDIQA,
    "hft_truthfulqa_open_instruct": (("truthfulqa_mc",), _plain("validation", member="truthfulqa_mc2")),
    "hft_humaneval": (("humaneval",), _plain("test")),
    "nq_open": (("nq_open",), _closed_book(list)),
    "triviaqa": (("triviaqa",), _closed_book(lambda answers: {"aliases": answers})),
    "hft_hotpotqa": (("hotpotqa",), _closed_book(lambda answers: answers[0])),
    "hft_nq_opencompass": (("nq_open",), QUESTION),
    "hft_triviaqa_opencompass": (("triviaqa_dev",), QUESTION),
    "ifeval": (("ifeval",), _plain("train")),
    "hft_mbpp": (("mbpp_test", "mbpp_prompt"), _mbpp),
    "hft_hellaswag_opencompass": (("hellaswag",), _plain("validation", _gold, "hellaswag", process_docs=None)),
    "hft_math_opencompass": (("math",), _plain("test", member="minerva_math_algebra")),
    "hft_execution_opencompass": (("execution",), _plain("test")),
}
