"""Rows that benchmarks are scored on: those of the quick suite, of a folder of JSON Lines files, and drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from hft.config import read_yaml
from hft.data.prepared import template_arguments
from hft.errors import HFTError
from hft.evaluation.subject import Subject, load_tokenizer
from hft.evaluation.suites import Benchmark, Settings
from hft.jsonl import read_jsonl
from hft.machine import say
from hft.runs.result import CONFIG_NAME, RESULTS_NAME, RunResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
Spec = str | dict[str, Any]  # what lm-eval runs: the name of a task or group, or the config of one
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
CHARACTERS = 1000  # of each text: 200 to 300 tokens
TEXTS_PER_TOPIC = 3
HELD_OUT_ROWS = 64
# open-instruct's (commit f342459), which draws rows and cuts the passages of TyDiQA.
DRAWING_SEED = 42
CONTEXT_TOKENS = 512


def spec_of(benchmark: Benchmark, subject: Subject, settings: Settings) -> Spec | None:
    """What lm-eval runs, on our rows where they are not the task's; None if there are none."""
    if benchmark.task in ("hft_drift", "hft_task", "hft_kl"):
        rows = _rows_of_quick(benchmark.name, subject, settings)
        return rows and on_rows({benchmark.task: {"test": rows}})
    if settings.data is None:
        return benchmark.task
    spec = local_spec(benchmark, Path(settings.data))
    if spec is None:
        say(f"{benchmark.name} is skipped: {settings.data} has no rows of it")
    return spec


def _rows_of_quick(name: str, subject: Subject, settings: Settings) -> list[dict[str, Any]] | None:
    if name == "drift":
        tokens = partial(load_tokenizer(subject.tokenizer), add_special_tokens=False)
        return [{"context": "", "answer": one, "tokens": len(tokens(one)["input_ids"])} for one in general_texts()]
    run = Path(settings.task_data or subject.name)
    if not (run / RESULTS_NAME).exists():
        say(f"{name} is skipped: {run} is not a finished run with held-out rows; name one with --task_data")
    elif name == "kl" and subject.base is None:
        say(f"{name} is skipped: {subject.name} does not name its base; name it with --base")
    elif settings.backend != "hf":
        say(f"{name} is skipped: it scores token ids, which needs --backend hf")
    else:
        return answer_rows(held_out_rows(run), load_tokenizer(run))
    return None


def general_texts() -> list[str]:
    """Prose that every machine has and no demo data holds: from every other of Python's reference topics."""
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()) for _, text in sorted(topics.items())[::2]]
    starts = range(0, TEXTS_PER_TOPIC * CHARACTERS, CHARACTERS)
    return [text[start:][:CHARACTERS] for text in texts for start in starts if len(text) >= start + CHARACTERS]


def answer_rows(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The last answer of each row, up to its end token, and what stands before it, as the run's `tokenizer` has it."""
    found = []
    for row in rows:
        if "text" in row or isinstance(row.get("prompt"), str):  # without a chat template
            answer = row.get("completion", row.get("text"))
            found.append({"context": row.get("prompt", ""), "answer": answer, "is_plain": True})
            continue
        prompt, answer = prompt_and_answer(row)
        render = partial(tokenizer.apply_chat_template, tokenize=False, **template_arguments(row))
        context = render(prompt, add_generation_prompt=True) if prompt else ""
        whole = render([*prompt, answer]).rstrip()
        if not whole.startswith(context):
            raise HFTError("the chat template renders an answered prompt differently; quick cannot score that")
        found.append({"context": context, "answer": whole[len(context) :]})
    return found


def prompt_and_answer(row: dict[str, Any]) -> tuple[list[dict], dict]:
    if "messages" in row:
        messages = row["messages"]
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        return messages[:last], messages[last]
    completion = row.get("completion") or row["chosen"]
    return [*row["prompt"], *completion[:-1]], completion[-1]


def held_out_rows(folder: Path) -> list[dict[str, Any]]:
    """The first rows of a run's own evaluation, in the form that its trainer takes."""
    from hft.data import load_data
    from hft.objectives import find_objective
    from hft.runs.config import load_config

    objective = RunResult.load(folder).objective
    config = load_config(objective, folder / CONFIG_NAME)
    test = load_data(config.run, find_objective(objective).read_rows, evaluate=True).test
    wanted = (row for row in test if row.get("label", True))  # of unpaired preferences the answers to learn
    return list(islice(wanted, HELD_OUT_ROWS))


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

    Loader = type("Loader", (yaml.SafeLoader,), {})
    Loader.add_constructor("!function", partial(import_function, yaml_path=path))
    content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    included = content.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        content = _read_yaml(path.parent / name) | content
    return content


def local_spec(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """A benchmark's task or group on the rows of a folder (files: docs/evaluation.md); None if it has none of it."""
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


def draw_rows(sizes: Mapping[str, int], rows: int, random: Random) -> dict[str, list[int]]:
    """The rows of each task, which are drawn one task after the other, in alphabetical order."""
    return {name: random.sample(range(n), rows) if n > rows else list(range(n)) for name, n in sorted(sizes.items())}


def draw_examples(tasks: Mapping[str, Any], tokenizer: Any, random: Random) -> None:
    """Draw one example per language, after the rows, and cut long passages, which gain a BOS token as there."""

    def cut(row: dict) -> dict:
        ids = tokenizer.encode(row["context"])
        return row | {"context": tokenizer.decode(ids[:CONTEXT_TOKENS])} if len(ids) > CONTEXT_TOKENS else row

    for _, task in sorted(tasks.items()):
        task.dataset[task.config.validation_split] = task.dataset[task.config.validation_split].map(cut)
        task.sampler.replace_df([cut(row) for row in random.sample(task.sampler.df, 1)])
