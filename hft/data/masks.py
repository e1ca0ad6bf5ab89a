"""Prove on rows that `assistant_only_loss` trains the assistant's tokens and no one else's."""

from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hft.data.templates import conversations, template_arguments, writes
from hft.errors import HFTError

MOST_ROWS = 1000  # tokenizing all of a large dataset twice more would take most of the time before the first step


def check_masks(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str, num_proc: int | None
) -> list[str]:
    """Check the assistant mask of rows, as TRL makes it; returns a note if some of the assistant's turns do not train.

    Template or tokenizer's offsets can be wrong. So rows, of a large dataset a sample spread evenly over it, are
    tokenized twice, the second time with every other text doubled: the trained tokens must be the same.
    """
    dataset = dataset.select(range(0, len(dataset), -(-len(dataset) // MOST_ROWS)))
    untrained = dataset.map(
        _untrained_turns,
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
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str
) -> dict[str, int]:
    where = f"dataset {name}, row {row['row']} (the first is 0)"
    [messages] = conversations(row)
    render = partial(tokenizer.apply_chat_template, **{"chat_template": chat_template, **template_arguments(row)})
    both = [messages, _doubled(messages)]
    encoded = render(both, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    masks = encoded["assistant_masks"]
    pairs = zip(encoded["input_ids"], masks, strict=True)
    trained, doubled = ([token for token, bit in zip(*pair, strict=True) if bit] for pair in pairs)
    if not trained:
        raise HFTError(f"{where}: the chat template marks no token of the assistant, so nothing is trained")
    if trained != doubled:
        raise HFTError(
            f"{where}: assistant_only_loss trains more than the assistant's tokens, {tokenizer.decode(trained)!r:.80}; "
            "the tokenizer's offsets or the template's {% generation %} blocks are wrong, choose another "
            "--chat_template_path"
        )
    if not writes("tool_calls", messages, partial(render, tokenize=False)):
        raise HFTError(f"{where}: the chat template does not write tool calls; choose one that does")
    starts = sum(now and not before for now, before in zip(masks[0], [0, *masks[0]], strict=False))
    return {"untrained": sum(message["role"] == "assistant" for message in messages) - starts}


def _doubled(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each text outside the assistant's said twice: other tokens, but the same beginning, end and words."""
    return [
        message
        if message["role"] == "assistant"
        else message | {"content": f"{message['content']} {message['content']}"}
        for message in messages
    ]
