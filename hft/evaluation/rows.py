"""Rows of the quick suite that depend on a tokenizer: general texts, and held-out rows of what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.data.templates import template_arguments
from hft.errors import HFTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 1000  # of each text: 200 to 300 tokens
TEXTS_PER_TOPIC = 3
HELD_OUT_ROWS = 64


def general_texts() -> list[str]:
    """Prose that every machine has and no demo data holds: from every other of Python's reference topics."""
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()) for _, text in sorted(topics.items())[::2]]
    starts = range(0, TEXTS_PER_TOPIC * CHARACTERS, CHARACTERS)
    return [text[start:][:CHARACTERS] for text in texts for start in starts if len(text) >= start + CHARACTERS]


def text_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    counts = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return [{"context": "", "answer": text, "tokens": count} for text, count in zip(texts, counts, strict=True)]


def answer_rows(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The last answer of each conversation or pair, up to its end token, and what stands before it.

    The chat template of `tokenizer`, the run's, renders them.
    """
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
    from hft.runs.result import CONFIG_NAME, RunResult

    objective = RunResult.load(folder).objective
    config = load_config(objective, folder / CONFIG_NAME)
    test = load_data(config.run, find_objective(objective).read_rows, evaluate=True).test
    wanted = (row for row in test if row.get("label", True))  # of unpaired preferences the answers to learn
    return list(islice(wanted, HELD_OUT_ROWS))
