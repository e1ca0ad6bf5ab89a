"""Check rows as TRL prepared them: what it dropped, what trains nothing, whose tokens are trained."""

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from hft.data.loading import LoadedData
from hft.data.masks import check_masks
from hft.data.templates import conversations, render_row, template_arguments, writes
from hft.errors import HFTError

PAIR = ["prompt_ids", "chosen_ids", "rejected_ids"]
TOKENS = ["input_ids", "completion_ids", *PAIR]
MESSAGE = {"role", "content"}


def check_prepared(trainer: Trainer, loaded: LoadedData, unit: str = "rows") -> list[str]:
    """Check what a TRL trainer is about to read, and drop rows without anything to learn; returns notes."""
    args, tokenizer = trainer.args, trainer.processing_class
    packed = getattr(args, "packing", False)
    eval_packed = packed if getattr(args, "eval_packing", None) is None else args.eval_packing
    notes = []
    with args.main_process_first(desc="checking the prepared rows"):
        for dataset in filter(None, (loaded.train, loaded.test)):
            notes += _template_notes(dataset, tokenizer)
            if getattr(args, "assistant_only_loss", False):
                notes += check_masks(dataset, tokenizer, trainer.chat_template, loaded.name, args.dataset_num_proc)
        if len(tokenizer) > (embedded := trainer.model.get_input_embeddings().weight.shape[0]):
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
    """Prepared rows that have something to learn, and notes on the others."""
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
    """Refuse rows with an id that the embeddings have no row for."""
    columns = [column for column in TOKENS if column in dataset.column_names]

    def largest(row: dict[str, list[int]]) -> int:
        return max(max(row[column] or [0]) for column in columns)

    if wrong := [index for index in _found(dataset, columns, largest, "checking token ids") if index >= embedded]:
        raise HFTError(
            f"{len(wrong):,} rows of dataset {name} hold {tokenizer.convert_ids_to_tokens(wrong[0])!r}, id {wrong[0]}, "
            f"and the embeddings have {embedded} rows; give the tokenizer that the model was trained with, or resize "
            "the embeddings first"
        )


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


def _template_notes(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the rows give and the chat template does not write, judged by the first row that has it."""
    notes = []
    for column, nothing in (("tools", None), ("chat_template_kwargs", {})):
        if column not in dataset.column_names:
            continue
        index = next((index for index, value in enumerate(dataset[column][:]) if value), None)
        row = dataset[index] if index is not None else None
        if row and render_row(row, tokenizer) == render_row(row | {column: nothing}, tokenizer):
            notes.append(f"{column}: the chat template writes the same without them")
    keys = _found(dataset, dataset.column_names, _message_keys, "reading the keys of messages")
    for key in sorted(set(chain(*keys))):
        row = dataset[next(index for index, found in enumerate(keys) if key in found)]
        render = partial(tokenizer.apply_chat_template, tokenize=False, **template_arguments(row))
        if not all(writes(key, messages, render) for messages in conversations(row)):
            count = sum(key in found for found in keys)
            notes.append(f"{key} in the messages of {count:,} rows: the chat template writes the same without it")
    return notes


def _message_keys(row: dict[str, Any]) -> list[str]:
    return sorted({key for message in chain(*conversations(row)) for key, value in message.items() if value} - MESSAGE)
