"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hft.errors import HFTError
from hft.evaluation.suites import Benchmark
from hft.jsonl import read_jsonl

Rows = list[dict[str, Any]]
MakesDataset = Callable[..., Any]  # takes lm-eval's keywords and returns a DatasetDict
Convert = Callable[[dict[str, Any]], dict[str, Any]]
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
    if make is None or not all(path.exists() for path in paths):
        return None
    try:
        return make(benchmark.task, *map(read_jsonl, paths))
    except KeyError as error:
        raise HFTError(f"the rows of {benchmark.name} in {folder} lack the field {error}") from error


def _form(*splits: str, convert: Convert = dict, member: str | None = None, **more: Any) -> MakesSpec:
    """A task on the rows of one file for each split, once they are converted.

    `member` says which task of a group a row belongs to, by the row's fields.
    """

    def make(task: str, *files: Rows) -> dict[str, Any]:
        tasks: dict[str, dict[str, Rows]] = {}
        for split, rows in zip(splits, files, strict=True):
            for row in rows:
                name = (member or task).format(**row)
                tasks.setdefault(name, {}).setdefault(split, []).append(convert(row))
        datasets = {name: as_dataset(**parts) for name, parts in tasks.items() if splits[0] in parts}
        return on_rows(datasets, read_group(task) if member else None, **more)

    return make


def _closed_book(answer: Callable[[list[str]], Any]) -> MakesSpec:
    """A task of questions without a passage; `answer` brings the right answers into its form."""
    return _form("validation", convert=lambda row: {"question": row["question"], "answer": answer(row["answers"])})


def _question_and_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": row["answer"]}


QUESTIONS = _form(
    "test", convert=lambda row: {"question": row["question"], "answers": row["answers"]}, process_docs=None
)
MMLU = (("mmlu_test", "mmlu_dev"), _form("test", "dev", member="mmlu_{subject}"))
BBH = (("bbh",), _form("test", member="bbh_cot_fewshot_{task}"))
# By the name of the task without a final `_chat`: the files, and what makes a task of their rows.
FORMS: dict[str, tuple[tuple[str, ...], MakesSpec]] = {
    "hft_mmlu_open_instruct": MMLU,
    "hft_mmlu_opencompass": MMLU,
    "hft_gsm8k_open_instruct": (("gsm8k_test",), _form("test", convert=_question_and_answer, member="gsm8k_cot")),
    "hft_gsm8k_opencompass": (("gsm8k_test",), _form("test", convert=_question_and_answer)),
    "hft_bbh_open_instruct": BBH,
    "hft_bbh_opencompass": BBH,
    "hft_tydiqa_open_instruct": (
        ("tydiqa_dev", "tydiqa_train"),
        _form("validation", "train", member="tydiqa_goldp_{language}", process_docs=None),
    ),
    "hft_truthfulqa_open_instruct": (("truthfulqa_mc",), _form("validation", member="truthfulqa_mc2")),
    "hft_humaneval_open_instruct": (("humaneval",), _form("test")),
    "hft_humaneval_opencompass": (("humaneval",), _form("test")),
    "nq_open": (("nq_open",), _closed_book(list)),
    "triviaqa": (("triviaqa",), _closed_book(lambda answers: {"aliases": answers})),
    "hft_hotpotqa": (("hotpotqa",), _closed_book(lambda answers: answers[0])),
    "hft_nq_opencompass": (("nq_open",), QUESTIONS),
    "hft_triviaqa_opencompass": (("triviaqa_dev",), QUESTIONS),
    "ifeval": (("ifeval",), _form("train")),
    "hft_mbpp_opencompass": (("mbpp_test",), _form("test")),
    "hft_hellaswag_opencompass": (("hellaswag",), _form("validation", member="hellaswag", process_docs=None)),
    "hft_math_opencompass": (("math",), _form("test", member="minerva_math_algebra")),
    "hft_execution_opencompass": (("execution",), _form("test")),
}
