"""Rows through the chat template, as TRL renders them, and what the template or TRL refuses."""

from collections.abc import Callable, Iterator
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


def render_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    arguments = template_arguments(row)
    return [tokenizer.apply_chat_template(chat, tokenize=False, **arguments) for chat in conversations(row)]


def writes(key: str, messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether a chat template writes what a conversation's messages hold under a key."""
    if not any(message.get(key) for message in messages):
        return True
    texts = [message | {"content": message["content"] or ""} for message in messages]
    silent = [{name: value for name, value in message.items() if name != key} for message in texts]
    try:
        return render(texts) != render(silent)
    except TemplateError:  # malformed without it, so the template reads it
        return True


@contextmanager
def refusals(loaded: LoadedData, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Around a trainer's constructor: what TRL refuses there, and a template that fails on a row, is an `HFTError`.

    The tokenizer must be the object that the trainer is given, since TRL puts its chat template there.
    """
    try:
        yield
    except HFTError:
        raise
    except (TemplateError, ValueError, TypeError, LookupError, RuntimeError) as error:
        _check_rendering(loaded, tokenizer)
        if isinstance(error, ValueError) or "assistant_only_loss" in str(error):
            raise HFTError(reason(error)) from error
        raise


def _check_rendering(loaded: LoadedData, tokenizer: PreTrainedTokenizerBase) -> None:
    for dataset in filter(None, (loaded.train, loaded.test)):
        for row in dataset:
            try:
                render_row(row, tokenizer)
            except (TemplateError, ValueError, TypeError, LookupError) as error:
                where = f"dataset {loaded.name}, row {row['row']} (the first is 0)"
                raise HFTError(f"{where}: the chat template fails: {reason(error)}") from error
