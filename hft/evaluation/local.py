"""Rows of the benchmarks from a folder of JSON Lines files, instead of lm-eval's data on the Hub."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from hft.errors import HFTError
from hft.jsonl import read_jsonl

Rows = list[dict[str, Any]]
TASK_FOLDER = Path(__file__).with_name("tasks")
OUTER, INNER = "local", "rows"


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
    return {"group": OUTER, "task": [{**content, "group": INNER, "task": members}] if group else members}


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


def local_spec(task: str, folder: Path) -> dict[str, Any] | None:
    """The task or group of a benchmark, on the rows of a folder; None if the folder has none of it.

    docs/evaluation.md lists the files and their fields. Prompts, shots, filters and metrics are the task's.
    """
    form = FORMS.get(task.removesuffix("_chat"))
    if form is None or not all((folder / f"{name}.jsonl").exists() for name in form.files.values()):
        return None
    tasks: dict[str, dict[str, Rows]] = {}
    for split, name in form.files.items():
        for row in read_rows(folder / f"{name}.jsonl"):
            member = (form.member or task).format(**row)
            tasks.setdefault(member, {}).setdefault(split, []).append(form.convert(row))
    tasks = {name: splits for name, splits in tasks.items() if next(iter(form.files)) in splits}
    return on_rows(tasks, task if form.member else None, **form.more)


def read_rows(path: Path) -> Rows:
    """The rows of a file of a benchmark, with the fields of `FIELDS` in their types."""
    rows = read_jsonl(path)
    try:
        return TypeAdapter(list[TypedDict(path.stem, FIELDS[path.stem])]).validate_python(rows)
    except ValidationError as error:
        number, *field = error.errors()[0]["loc"]
        where = f"{path}, row {number} (the first is 0), {'.'.join(map(str, field))}"
        raise HFTError(f"{where}: {error.errors()[0]['msg']}") from None


class Form(NamedTuple):
    """How the rows of files become a task, or the tasks of a group."""

    files: Mapping[str, str]  # by split, the one that is scored first
    member: str | None = None  # the task of the group that a row belongs to, by the row's fields
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict
    more: Mapping[str, Any] = {}  # keys that differ from the task's YAML


def _closed_book(file: str, answer: Callable[[list[str]], Any]) -> Form:
    """Questions without a passage; `answer` brings the right answers into the form of lm-eval's task."""
    return Form({"validation": file}, None, lambda row: {"question": row["question"], "answer": answer(row["answers"])})


Texts = Annotated[list[str], Field(min_length=1)]
Four = Annotated[list[str], Field(min_length=4, max_length=4)]
OneOfFour = Annotated[int, Field(ge=0, le=3)]


class Targets(TypedDict):
    choices: Texts
    labels: list[Literal[0, 1]]


QUESTION = {"question": str, "answers": Texts}
MMLU = {"question": str, "choices": Four, "answer": OneOfFour, "subject": str}
CODE = {"prompt": str, "entry_point": str, "canonical_solution": str, "test": str, "instruction": NotRequired[str]}
# By the name of the file: the fields that are read of its rows.
FIELDS: dict[str, dict[str, Any]] = {
    "mmlu_test": MMLU,
    "mmlu_dev": MMLU,
    "gsm8k_test": {"question": str, "answer": str},
    "bbh": {"task": str, "input": str, "target": str},
    "truthfulqa_mc": {"question": str, "mc1_targets": Targets, "mc2_targets": Targets},
    "humaneval": CODE,
    "nq_open": QUESTION,
    "triviaqa": QUESTION,
    "triviaqa_dev": QUESTION,
    "hotpotqa": QUESTION,
    "ifeval": {"key": Any, "prompt": str, "instruction_id_list": Texts, "kwargs": list[dict[str, Any]]},
    "mbpp_test": {"text": str, "code": str, "test_list": Texts},
    "hellaswag": {"query": str, "choices": Four, "label": OneOfFour},
    "tydiqa_dev": QUESTION | {"language": str, "context": str},
    "tydiqa_train": QUESTION | {"language": str, "context": str},
    "math": {"problem": str, "solution": str},
    "execution": {"code": str, "input": str, "output": str},
    "alpaca_eval": {"instruction": str, "dataset": NotRequired[str]},
}

PLAIN = {"process_docs": None}  # rows that need none of the task's changes
# By the name of the task without a final `_chat`.
FORMS = {
    "hft_mmlu_open_instruct": Form({"test": "mmlu_test", "dev": "mmlu_dev"}, "mmlu_{subject}"),
    "hft_mmlu_opencompass": Form({"test": "mmlu_test", "dev": "mmlu_dev"}, "mmlu_{subject}"),
    "hft_gsm8k_open_instruct": Form({"test": "gsm8k_test"}, "gsm8k_cot"),
    "hft_gsm8k_opencompass": Form({"test": "gsm8k_test"}),
    "hft_bbh_open_instruct": Form({"test": "bbh"}, "bbh_cot_fewshot_{task}"),
    "hft_bbh_opencompass": Form({"test": "bbh"}, "bbh_cot_fewshot_{task}"),
    "hft_tydiqa_open_instruct": Form(
        {"validation": "tydiqa_dev", "train": "tydiqa_train"}, "tydiqa_goldp_{language}", more=PLAIN
    ),
    "hft_truthfulqa_open_instruct": Form({"validation": "truthfulqa_mc"}, "truthfulqa_mc2"),
    "hft_humaneval_open_instruct": Form({"test": "humaneval"}),
    "hft_humaneval_opencompass": Form({"test": "humaneval"}),
    "nq_open": _closed_book("nq_open", list),
    "triviaqa": _closed_book("triviaqa", lambda answers: {"aliases": answers}),
    "hft_hotpotqa": _closed_book("hotpotqa", lambda answers: answers[0]),
    "hft_nq_opencompass": Form({"test": "nq_open"}, more=PLAIN),
    "hft_triviaqa_opencompass": Form({"test": "triviaqa_dev"}, more=PLAIN),
    "ifeval": Form({"train": "ifeval"}),
    "hft_mbpp_opencompass": Form({"test": "mbpp_test"}),
    "hft_hellaswag_opencompass": Form({"validation": "hellaswag"}, "hellaswag", more=PLAIN),
    "hft_math_opencompass": Form({"test": "math"}, "minerva_math_algebra"),
    "hft_execution_opencompass": Form({"test": "execution"}),
}
