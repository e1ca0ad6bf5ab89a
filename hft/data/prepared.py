"""Rows as TRL renders and prepares them: what it refuses or drops, what trains nothing, whose tokens are trained."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, Trainer

from hft.data.loading import LoadedData
from hft.errors import HFTError, reason

PAIR = ["prompt_ids", "chosen_ids", "rejected_ids"]
TOKENS = ["input_ids", "completion_ids", *PAIR]
MOST_ROWS = 1000  # tokenizing all of a large dataset twice more would take most of the time before the first step


def check_prepared(trainer: Trainer, loaded: LoadedData, unit: str = "rows") -> list[str]:
    """Check what a TRL trainer is about to read, and drop rows without anything to learn; returns notes."""
    args, tokenizer = trainer.args, trainer.processing_class
    packed = getattr(args, "packing", False)
    eval_packed = packed if getattr(args, "eval_packing", None) is None else args.eval_packing
    embedded, notes = trainer.model.get_input_embeddings().weight.shape[0], []
    with args.main_process_first(desc="checking the prepared rows"):
        for dataset in filter(None, (loaded.train, loaded.test)):
            notes += _template_notes(dataset, tokenizer, loaded.name)
            if getattr(args, "assistant_only_loss", False):
                notes += _mask_notes(dataset, tokenizer, trainer.chat_template, loaded.name)
        if len(tokenizer) > embedded:
            for dataset in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
                _check_ids(dataset, embedded, tokenizer, loaded.name)
        trainer.train_dataset, found = _learnable(trainer.train_dataset, loaded.train, f"training {unit}", packed, args)
        notes += found
        if loaded.test is not None:
            dataset, name = trainer.eval_dataset, f"held-out {unit}"
            trainer.eval_dataset, found = _learnable(dataset, loaded.test, name, eval_packed, args)
            notes += found
    return list(dict.fromkeys(notes))


def tokens_digest(prepared: Dataset) -> str:
    """SHA-256 of what a trainer is about to read; a template with a clock, say, makes other tokens another day."""
    columns = [column for column in (*TOKENS, "labels", "seq_lengths") if column in prepared.column_names]
    found = hashlib.sha256()
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        for lists in (batch[column].combine_chunks() for column in columns):
            for values in (pc.list_value_length(lists), pc.list_flatten(lists)):
                found.update(values.to_numpy(zero_copy_only=False).tobytes())
    return found.hexdigest()


def _learnable(prepared: Dataset, given: Dataset, rows: str, packed: bool, args: Any) -> tuple[Dataset, list[str]]:
    fills, same = f"prompt alone fills max_length {args.max_length}", "answers are the same tokens"
    kept, fault, notes = prepared, f"the {fills}", []
    if packed:
        kept, lost = _packed_that_train(prepared)
        notes.append(f"packed {len(given):,} {rows} into {len(prepared):,}")
        notes += [f"{lost:,} {rows} train nothing, since their {fills}"] if lost else []
    elif dropped := len(given) - len(prepared):
        notes.append(f"dropped {dropped:,} {rows} whose {fills}")
    if not packed and len(prepared) and {*PAIR} <= {*prepared.column_names}:
        kept, fault = _distinct_pairs(prepared, args), f"the {same}"
        if alike := len(prepared) - len(kept):
            notes.append(f"dropped {alike:,} {rows} whose {same} within max_length {args.max_length}")
    if not len(kept):
        raise HFTError(f"in every {rows.removesuffix('s')} {fault}; raise max_length")
    return kept, notes


def _found(dataset: Dataset, columns: list[str], find: Callable[[dict[str, Any]], Any], desc: str) -> list[Any]:
    rows = dataset.select_columns(columns)
    return rows.map(lambda row: {"found": find(row)}, remove_columns=columns, desc=desc)["found"][:]


def _select(dataset: Dataset, wanted: list[bool]) -> Dataset:
    return dataset if all(wanted) else dataset.select([index for index, keep in enumerate(wanted) if keep])


def _check_ids(dataset: Dataset, embedded: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    columns = [column for column in TOKENS if column in dataset.column_names]

    def largest(row: dict[str, list[int]]) -> int:
        return max(max(row[column] or [0]) for column in columns)

    if wrong := [index for index in _found(dataset, columns, largest, "checking token ids") if index >= embedded]:
        held = f"{tokenizer.convert_ids_to_tokens(wrong[0])!r}, id {wrong[0]}, and the embeddings have {embedded} rows"
        remedy = "give the tokenizer that the model was trained with, or resize the embeddings first"
        raise HFTError(f"{len(wrong):,} rows of dataset {name} hold {held}; {remedy}")


def _distinct_pairs(pairs: Dataset, args: Any) -> Dataset:
    """The pairs whose answers differ after truncation; the gradient of others is rounding noise."""
    kept = slice(None)
    if args.max_length is not None:
        kept = slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)

    def differ(row: dict[str, list[int]]) -> bool:
        chosen, rejected = (row["prompt_ids"] + row[answer] for answer in ("chosen_ids", "rejected_ids"))
        return chosen[kept] != rejected[kept]

    return _select(pairs, _found(pairs, PAIR, differ, "comparing answers"))


def _packed_that_train(packed: Dataset) -> tuple[Dataset, int]:
    """The packed rows that train anything; and how many of the rows in them do not."""
    columns = [column for column in ("labels", "seq_lengths") if column in packed.column_names]

    def lost(row: dict[str, list]) -> dict[str, int]:
        labels = iter(row["labels"])
        parts = [set(islice(labels, length)) for length in row.get("seq_lengths", ())]
        return {"whole": set(row["labels"]) <= {-100}, "parts": sum(part <= {-100} for part in parts)}

    found = _found(packed, columns, lost, "checking packed rows")
    return _select(packed, [not row["whole"] for row in found]), sum(row["parts"] for row in found)


def _template_notes(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """What the rows give and the chat template does not write, judged by the first row that has it."""
    notes, given = [], _found(dataset, dataset.column_names, _given, "reading the keys of rows")
    for key in sorted(set(chain(*given))):
        row = dataset[next(index for index, keys in enumerate(given) if key in keys)]
        try:
            is_written = render_row(row, tokenizer) != render_row(row, tokenizer, without=key)
        except (TemplateError, TypeError):  # malformed without it, so the template reads it
            continue
        if key == "tool_calls" and not is_written:
            where = f"dataset {name}, row {row['row']} (the first is 0)"
            raise HFTError(f"{where}: the chat template does not write tool calls; choose one that does")
        if not is_written:
            notes.append(f"{key} of {sum(key in keys for keys in given):,} rows: the chat template does not write it")
    return notes


def _given(row: dict[str, Any]) -> list[str]:
    """What a row gives to a chat template beside roles and contents: columns, and keys of messages."""
    keys = {key for message in chain(*conversations(row)) for key, value in message.items() if value or value == 0}
    return [*(keys - {"role", "content"}), *(key for key in ("tools", "chat_template_kwargs") if row.get(key))]


def _mask_notes(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> list[str]:
    """Check the assistant mask of rows, as TRL makes it; returns a note if some of the assistant's turns do not train.

    The template or offsets can be wrong: with every other text doubled the same tokens must train, of some rows.
    """
    rows = dataset.select(range(0, len(dataset), -(-len(dataset) // MOST_ROWS)))
    untrained = [(row["row"], turns) for row in rows if (turns := _untrained(row, tokenizer, template, name)) > 0]
    if not untrained:
        return []
    return [
        f"assistant turns not trained under this chat template: {sum(turns for _, turns in untrained):,}, in "
        f"{len(untrained):,} of {len(rows):,} rows that were checked, the first is row {untrained[0][0]}"
    ]


def _untrained(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> int:
    """How many of the assistant's turns in a row do not train."""
    where = f"dataset {name}, row {row['row']} (the first is 0)"
    [messages] = conversations(row)
    # Said twice: other tokens, but the same beginning, end and words.
    doubled = [
        message | ({} if message["role"] == "assistant" else {"content": " ".join([message["content"]] * 2)})
        for message in messages
    ]
    how = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template([messages, doubled], **how | template_arguments(row))
    pairs = zip(encoded["input_ids"], masks := encoded["assistant_masks"], strict=True)
    once, twice = ([token for token, bit in zip(*pair, strict=True) if bit] for pair in pairs)
    if not once:
        raise HFTError(f"{where}: the chat template marks no token of the assistant, so nothing is trained")
    if once != twice:
        what = f"assistant_only_loss trains more than the assistant's tokens, {tokenizer.decode(once)!r:.80}"
        why = "the tokenizer's offsets or the template's {% generation %} blocks are wrong"
        raise HFTError(f"{where}: {what}; {why}, choose another --chat_template_path")
    starts = sum(now and not before for now, before in zip(masks[0], [0, *masks[0]], strict=False))
    return sum(message["role"] == "assistant" for message in messages) - starts


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
    except (TemplateError, ValueError, TypeError, LookupError, RuntimeError, OSError) as error:
        for row in (row for dataset in filter(None, (loaded.train, loaded.test)) for row in dataset):
            try:
                render_row(row, tokenizer)
            except (TemplateError, ValueError, TypeError, LookupError) as wrong:
                where = f"dataset {loaded.name}, row {row['row']} (the first is 0)"
                raise HFTError(f"{where}: the chat template fails: {reason(wrong)}") from wrong
        about_hub = getattr(error, "filename", "") is None  # and not about the output folder
        if isinstance(error, ValueError) or about_hub or "assistant_only_loss" in str(error):
            raise HFTError(reason(error)) from error
        raise
