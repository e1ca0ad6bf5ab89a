"""Rows of the quick suite that depend on a tokenizer: general texts, and held-out rows of what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 1000  # of each text: 200 to 300 tokens
TEXTS_PER_TOPIC = 3
HELD_OUT_ROWS = 64


def general_texts(first: int = 0) -> list[str]:
    """Prose that every machine has and no demo data holds: from every other of Python's reference topics."""
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()) for _, text in sorted(topics.items())[first::2]]
    starts = range(0, TEXTS_PER_TOPIC * CHARACTERS, CHARACTERS)
    return [text[start:][:CHARACTERS] for text in texts for start in starts if len(text) >= start + CHARACTERS]


def replay_texts() -> list[str]:
    """Prose of the same kind to train on: from the other topics."""
    return general_texts(first=1)


def text_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return [_task_row(tokenizer, "", text) for text in texts]


def answer_rows(
    rows: Iterable[dict[str, Any]], template: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The last answer of each conversation or pair, up to its end token, after what comes before it.

    `template` is the run's tokenizer, whose chat template is used; `tokenizer` that of the model that is scored.
    """
    made = []
    rows = list(rows)
    if rows and ("text" in rows[0] or isinstance(rows[0].get("prompt"), str)):  # without a chat template
        return [_task_row(tokenizer, row.get("prompt", ""), row.get("completion", row.get("text"))) for row in rows]
    for prompt, answer in _prompts_and_answers(rows):
        context = template.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if prompt else ""
        whole = template.apply_chat_template([*prompt, answer], tokenize=False).rstrip()
        if not whole.startswith(context):
            raise HFTError("the chat template renders an answered prompt differently; quick cannot score that")
        made.append(_task_row(tokenizer, context, whole[len(context) :]))
    return made


def _prompts_and_answers(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[list[dict], dict]]:
    for row in rows:
        if "messages" in row:
            messages = row["messages"]
            last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
            yield messages[:last], messages[last]
        else:
            completion = row.get("completion") or row["chosen"]
            yield [*row["prompt"], *completion[:-1]], completion[-1]


def _task_row(tokenizer: PreTrainedTokenizerBase, context: str, answer: str) -> dict[str, Any]:
    """A row as the tasks read it; lm-eval tokenizes the context without the whitespace that ends it."""
    stripped = context.rstrip()
    answer = context[len(stripped) :] + answer
    before = len(tokenizer(stripped, add_special_tokens=False)["input_ids"])
    tokens = len(tokenizer(stripped + answer, add_special_tokens=False)["input_ids"]) - before
    return {"context": stripped, "answer": answer, "tokens": tokens}


def held_out_rows(folder: Path) -> list[dict[str, Any]]:
    """The first rows of a run's own evaluation, in the form that its trainer takes."""
    from hft.data import load_data
    from hft.objectives import find_objective
    from hft.runs.config import load_config
    from hft.runs.result import CONFIG_NAME, RunResult

    objective = RunResult.load(folder).objective
    config = load_config(objective, folder / CONFIG_NAME)
    test = load_data(config.run, find_objective(objective).read_rows, evaluate=True).test
    return list(test.select(range(min(HELD_OUT_ROWS, len(test)))))
