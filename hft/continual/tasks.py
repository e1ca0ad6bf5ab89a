"""The tasks of a sequence: rows from TRACE's folder, and what keeps their instruction when they are too long.

TRACE's folders (BeyonderXX/TRACE, arXiv 2310.06762) are `TASK/{train,eval,test}.json`, lists of `{"prompt", "answer"}`
whose prompts hold the instruction. `.jsonl` with the same fields is read too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hft.continual.metrics import METRICS
from hft.errors import HFTError, reason, shorten
from hft.jsonl import read_jsonl
from hft.methods.strategy import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRACE = {  # the metric of each of its tasks (A.3.2)
    "C-STANCE": "choice",
    "FOMC": "choice",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "choice_and_reason",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "rouge_l",
}


def metrics_of(tasks: list[str], given: dict[str, str]) -> dict[str, str]:
    """The key of `METRICS` that each task is scored by: the one that was given, or TRACE's."""
    if others := [name for name in given if name not in tasks]:
        raise HFTError(f"metrics has {others[0]}, which is not among the tasks {', '.join(tasks)}")
    chosen = {task: given.get(task) or TRACE.get(task) for task in tasks}
    for task, metric in chosen.items():
        if metric not in METRICS:
            known = f"unknown metric {metric!r} of {task}" if metric else f"{task} is not in TRACE and has no metric"
            raise HFTError(f"{known}; give one of {', '.join(METRICS)}, as --metrics '{{{task}: accuracy}}'")
    return chosen


def check_folder(trace_dir: str | None, needed: dict[str, str]) -> Path:
    """The folder of the tasks, with all splits that each of them needs, such as `train test`."""
    if not trace_dir:
        raise HFTError("trace_dir is needed: the folder with a folder per task, each with train.json and test.json")
    folder = Path(trace_dir).expanduser()
    if not folder.is_dir():
        raise HFTError(f"trace_dir {trace_dir} does not exist; it holds a folder per task, as TRACE's release has them")
    files = [(task, split) for task, splits in needed.items() for split in splits.split()]
    if missing := ["/".join(file) for file in files if not _task_file(folder, *file)]:
        raise HFTError(
            f"trace_dir {trace_dir} lacks {shorten(missing)}, as .json or .jsonl; add them, or name other tasks"
        )
    return folder


def _task_file(folder: Path, task: str, split: str) -> Path | None:
    return next((path for end in ("json", "jsonl") if (path := folder / task / f"{split}.{end}").is_file()), None)


def read_task(folder: Path, task: str, split: str) -> list[Row]:
    """The rows of one split of a task, without those whose answer is empty, as `prompt` and `completion`."""
    path = _task_file(folder, task, split)
    try:
        rows = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
        made = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise HFTError(f"{path} is not a list of rows with prompt and answer: {reason(error)}") from error
    if wrong := [n for n, row in enumerate(made) if not all(isinstance(text, str) for text in row.values())]:
        raise HFTError(f"{path}, row {wrong[0]} (the first is 0): prompt and answer must be text")
    if not (kept := [row for row in made if row["completion"].strip()]):
        raise HFTError(f"{path} has no row with an answer")
    return kept


def notes_on(task: str, train: list[Row], test: list[Row]) -> list[str]:
    """What the files of a task hold that its numbers depend on: repeated rows, and test prompts that are trained on."""
    different = len({(row["prompt"], row["completion"]) for row in train})
    trained = {row["prompt"] for row in train}
    seen = sum(row["prompt"] in trained for row in test)
    notes = [f"{task}: {different:,} of {len(train):,} training rows are different"] if different < len(train) else []
    return notes + ([f"{task}: {seen:,} of {len(test):,} test prompts are also trained on"] if seen else [])


def shorten_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, longest_prompt: int, longest_answer: int, name: str
) -> list[Row]:
    """Rows whose rendered prompt, and answer with its EOS, have at most so many tokens.

    A long prompt loses its middle, so that instruction and last line stay; TRACE's code cuts the beginning.
    """
    empty = [{"role": "user", "content": ""}]
    around = tokenizer.apply_chat_template(empty, add_generation_prompt=True, tokenize=True, return_dict=True)
    room = max(1, longest_prompt - len(around.input_ids))
    made = []
    for start in tqdm(range(0, len(rows), 256), desc=f"shortening {name}", leave=False):
        batch = rows[start : start + 256]
        prompts = _ends([row["prompt"] for row in batch], tokenizer, math.ceil(room / 2), room // 2)
        answers = _ends([row["completion"] for row in batch], tokenizer, longest_answer - 1)
        made += [row | {"prompt": p, "completion": a} for row, p, a in zip(batch, prompts, answers, strict=True)]
    return made


def _ends(texts: list[str], tokenizer: PreTrainedTokenizerBase, first: int, last: int = 0) -> list[str]:
    """The first and the last tokens of each text that has more."""
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    def cut(text: str, tokens: list[tuple[int, int]]) -> str:
        if len(tokens) <= first + last:
            return text
        return text[: tokens[first - 1][1]] + (text[tokens[-last][0] :] if last else "")

    return list(map(cut, texts, offsets))
