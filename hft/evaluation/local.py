"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from hft.errors import HFTError
from hft.evaluation.suites import Benchmark
from hft.jsonl import read_jsonl

Rows = list[dict[str, Any]]
MakesDataset = Callable[..., Any]  # takes lm-eval's keywords and returns a DatasetDict
Convert = Callable[[dict[str, Any]], dict[str, Any]]
MakesSpec = Callable[..., dict[str, Any]]  # takes the name of a task and the rows of each file
TASK_FOLDER = Path(__file__).with_name("tasks")
OUTER, INNER = "local", "rows"


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
    return make(benchmark.task, *map(read_rows, paths))


def read_rows(path: Path) -> Rows:
    """The rows of a file of a benchmark, each with the fields that `FIELDS` asks for, in their types."""
    model = create_model(path.stem, __config__=ConfigDict(extra="allow"), **FIELDS[path.stem])
    rows = []
    for number, row in enumerate(read_jsonl(path)):
        try:
            rows.append(model.model_validate(row).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            raise HFTError(f"{path}, row {number} (the first is 0), {where}: {what}") from None
    return rows


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


def _number_of(letter: Any) -> Any:
    """0 for A, as other copies of a benchmark have it; digits as text are read."""
    return LETTERS.index(letter) if isinstance(letter, str) and letter in LETTERS else letter


LETTERS = ("A", "B", "C", "D")
Text = (str, ...)
Texts = Annotated[list[str], Field(min_length=1)]
# One text counts as a list of one.
Answers = (Annotated[Texts, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)], ...)
Four = (Annotated[list[str], Field(min_length=4, max_length=4)], ...)
OneOfFour = (Annotated[int, BeforeValidator(_number_of), Field(ge=0, le=3)], ...)


class Targets(BaseModel):
    """TruthfulQA's candidates and which of them are true."""

    choices: Texts
    labels: list[Literal[0, 1]]


CLOSED_BOOK_ROW = {"question": Text, "answers": Answers}
MMLU_ROW = {"question": Text, "choices": Four, "answer": OneOfFour, "subject": Text}
TYDIQA_ROW = CLOSED_BOOK_ROW | {"language": Text, "context": Text}
MBPP_ROW = {"text": Text, "code": Text, "test_list": (Texts, ...)}
# By name of the file: the fields of its rows; others may be there.
FIELDS: dict[str, dict[str, Any]] = {
    "mmlu_test": MMLU_ROW,
    "mmlu_dev": MMLU_ROW,
    "gsm8k_test": {"question": Text, "answer": Text},
    "bbh": {"task": Text, "input": Text, "target": Text},
    "truthfulqa_mc": {"question": Text, "mc1_targets": (Targets, ...), "mc2_targets": (Targets, ...)},
    "humaneval": dict.fromkeys(("prompt", "entry_point", "canonical_solution", "test"), Text),
    "nq_open": CLOSED_BOOK_ROW,
    "triviaqa": CLOSED_BOOK_ROW,
    "triviaqa_dev": CLOSED_BOOK_ROW,
    "hotpotqa": CLOSED_BOOK_ROW,
    "ifeval": {"prompt": Text, "instruction_id_list": (Texts, ...), "kwargs": (list[dict[str, Any]], ...)},
    "mbpp_test": MBPP_ROW,
    "hellaswag": {"query": Text, "choices": Four, "label": OneOfFour},
    "tydiqa_dev": TYDIQA_ROW,
    "tydiqa_train": TYDIQA_ROW,
    "math": {"problem": Text, "solution": Text},
    "execution": {"code": Text, "input": Text, "output": Text},
    "alpaca_eval": {"instruction": Text},
}


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
