"""Rows through the chat template, as TRL renders them, and what the template or TRL refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hft.data.loading import LoadedData
from hft.errors import HFTError, reason


def conversations(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The conversations that TRL renders for a row of `sft_rows` or `preference_rows`."""
    if "messages" in row:
        return [row["messages"]]
    if "text" in row or isinstance(row["prompt"], str):  # TRL renders no text
        return []
    return [row["prompt"] + row[key] for key in ("completion", "chosen", "rejected") if key in row]


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What a row gives to the chat template besides its conversation."""
    return {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}


def render_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, without: str | None = None) -> list[str]:
    """The text of a row's conversations; `without` a column, or a key of messages."""
    arguments = template_arguments({column: value for column, value in row.items() if column != without})
    chats = [[{k: v for k, v in message.items() if k != without} for message in chat] for chat in conversations(row)]
    return [tokenizer.apply_chat_template(chat, tokenize=False, **arguments) for chat in chats]


@contextmanager
def refusals(loaded: LoadedData, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Around a trainer's constructor: what TRL refuses there, and a template that fails on a row, is an `HFTError`."""
    try:
        yield
    except HFTError:
        raise
    except (TemplateError, ValueError, TypeError, LookupError, RuntimeError) as error:
        for row in (row for dataset in filter(None, (loaded.train, loaded.test)) for row in dataset):
            try:
                render_row(row, tokenizer)
            except (TemplateError, ValueError, TypeError, LookupError) as wrong:
                where = f"dataset {loaded.name}, row {row['row']} (the first is 0)"
                raise HFTError(f"{where}: the chat template fails: {reason(wrong)}") from wrong
        if isinstance(error, ValueError) or "assistant_only_loss" in str(error):
            raise HFTError(reason(error)) from error
        raise
