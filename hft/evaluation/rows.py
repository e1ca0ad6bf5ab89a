"""Rows of the quick suite that depend on a tokenizer: general texts, and held-out rows of what was trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
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
MARK = re.compile(r"{%-?\s*generation\b")  # before what an assistant writes


def general_texts(first: int = 0) -> list[str]:
    """Prose that every machine has and no demo data holds: from every other of Python's reference topics."""
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()) for _, text in sorted(topics.items())[first::2]]
    starts = range(0, TEXTS_PER_TOPIC * CHARACTERS, CHARACTERS)
    return [text[start:][:CHARACTERS] for text in texts for start in starts if len(text) >= start + CHARACTERS]


def replay_texts() -> list[str]:
    """Prose of the same kind to train on: from the other topics."""
    return general_texts(first=1)


def text_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    counts = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return [{"context": "", "answer": text, "tokens": count} for text, count in zip(texts, counts, strict=True)]


def answer_rows(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The last answer of each conversation or pair, up to its end token, and what stands before it.

    The chat template of `tokenizer`, the run's, renders them. Where it marks what trains, the answer is what it marks.
    """
    rows = list(rows)
    if rows and ("text" in rows[0] or isinstance(rows[0].get("prompt"), str)):  # without a chat template
        texts = ((row.get("prompt", ""), row.get("completion", row.get("text"))) for row in rows)
        return [{"context": prompt, "answer": answer, "is_plain": True} for prompt, answer in texts]
    split = _marked if MARK.search(str(tokenizer.chat_template)) else _after_prompt
    return [
        split(*prompt_and_answer(row), partial(tokenizer.apply_chat_template, **template_arguments(row)))
        for row in rows
    ]


def _marked(prompt: list[dict], answer: dict, render: Callable[..., Any]) -> dict[str, str]:
    chat = [*prompt, answer]
    text = render(chat, tokenize=False)
    offsets = {"return_offsets_mapping": True}
    found = render(chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=offsets)
    trained = [index for index, bit in enumerate(found["assistant_masks"]) if bit]
    first = max(index for index in trained if index - 1 not in trained)
    start, end = found["offset_mapping"][first][0], found["offset_mapping"][trained[-1]][1]
    return {"context": text[:start], "answer": text[start:end].rstrip()}


def _after_prompt(prompt: list[dict], answer: dict, render: Callable[..., Any]) -> dict[str, str]:
    context = render(prompt, tokenize=False, add_generation_prompt=True) if prompt else ""
    whole = render([*prompt, answer], tokenize=False).rstrip()
    if not whole.startswith(context):
        raise HFTError("the chat template renders an answered prompt differently; quick cannot score that")
    return {"context": context, "answer": whole[len(context) :]}


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
