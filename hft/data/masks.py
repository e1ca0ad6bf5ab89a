"""Prove on rows that `assistant_only_loss` trains the assistant's tokens and no one else's."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hft.data.templates import conversations, template_arguments
from hft.errors import HFTError

MOST_ROWS = 1000  # tokenizing all of a large dataset twice more would take most of the time before the first step


def check_masks(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str, num_proc: int | None
) -> list[str]:
    """Check the assistant mask of rows, as TRL makes it; returns a note if some of the assistant's turns do not train.

    The mask comes from the chat template and from the tokenizer's offsets, and either can be wrong. So each row is
    tokenized twice, the second time with every text doubled that is not the assistant's: the trained tokens must be
    the same. What is checked is the template: of a large dataset a sample does, spread evenly over it.
    """
    dataset = dataset.select(range(0, len(dataset), -(-len(dataset) // MOST_ROWS)))
    untrained = dataset.map(
        _untrained_turns,
        batched=True,
        batch_size=256,
        fn_kwargs={"tokenizer": tokenizer, "chat_template": chat_template, "name": name},
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="checking the assistant mask",
    )["untrained"][:]
    rows = [row for row, turns in zip(dataset["row"][:], untrained, strict=True) if turns > 0]
    if not rows:
        return []
    turns = sum(turns for turns in untrained if turns > 0)
    return [
        f"assistant turns not trained under this chat template: {turns:,}, in {len(rows):,} of {len(dataset):,} rows "
        f"that were checked, the first is row {rows[0]}"
    ]


def _untrained_turns(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str
) -> dict[str, list[int]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    untrained: list[int] = []
    for arguments, alike in groupby(rows, template_arguments):
        group = list(alike)
        chats = [conversations(row)[0] for row in group]
        render = partial(tokenizer.apply_chat_template, **{"chat_template": chat_template, **arguments})
        encoded = render(
            chats + [_doubled(messages) for messages in chats],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, masks = encoded["input_ids"], encoded["assistant_masks"]
        trained = [[token for token, bit in zip(*pair, strict=True) if bit] for pair in zip(ids, masks, strict=True)]
        for index, (row, messages) in enumerate(zip(group, chats, strict=True)):
            if fault := _fault(messages, trained[index], trained[len(group) + index], render, tokenizer):
                raise HFTError(f"dataset {name}, row {row['row']} (the first is 0): {fault}")
            mask = masks[index]
            runs = sum(now and not before for now, before in zip(mask, [0, *mask], strict=False))
            untrained.append(sum(message["role"] == "assistant" for message in messages) - runs)
    return {"untrained": untrained}


def _fault(
    messages: list[dict], trained: list[int], doubled: list[int], render: partial, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """What is wrong with a row, by the tokens that train in it and in its doubled copy."""
    if not trained:
        return "the chat template marks no token of the assistant, so nothing is trained"
    if trained != doubled:
        return (
            f"assistant_only_loss trains more than the assistant's tokens, {tokenizer.decode(trained)!r:.80}; the "
            "tokenizer's offsets or the template's {% generation %} blocks are wrong, choose another "
            "--chat_template_path"
        )
    return (
        None if _writes_calls(messages, render) else "the chat template does not write tool calls; choose one that does"
    )


def _doubled(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each text that is not the assistant's said twice: other tokens, but the same beginning, end and words."""
    return [
        message
        if message["role"] == "assistant"
        else message | {"content": f"{message['content']} {message['content']}"}
        for message in messages
    ]


def _writes_calls(messages: list[dict[str, Any]], render: partial) -> bool:
    """Whether a chat template writes a conversation's tool calls; else a turn that is a call trains its end alone."""
    if not any(message.get("tool_calls") for message in messages):
        return True
    texts = [message | {"content": message["content"] or ""} for message in messages]
    silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in texts]
    try:
        return render(texts, tokenize=False) != render(silent, tokenize=False)
    except TemplateError:  # malformed without its calls, so the template reads them
        return True
