"""Check rows as TRL prepared them: what it dropped, what trains nothing, whose tokens are trained."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from hft.data.loading import LoadedData
from hft.data.masks import check_masks
from hft.data.templates import render_row
from hft.errors import HFTError

PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKENS = ("input_ids", "completion_ids", *PAIR)


def check_prepared(trainer: Trainer, loaded: LoadedData, unit: str = "rows") -> list[str]:
    """Check what a TRL trainer is about to train and evaluate on; returns notes, one line per finding.

    Replaces `trainer.train_dataset` and `trainer.eval_dataset` where rows have nothing to learn. `unit` is what a row
    of the dataset is called.
    """
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
            trainer.eval_dataset, found = _learnable(
                trainer.eval_dataset, loaded.test, f"held-out {unit}", eval_packed, args
            )
            notes += found
    return list(dict.fromkeys(notes))


def _learnable(prepared: Dataset, given: Dataset, rows: str, packed: bool, args: Any) -> tuple[Dataset, list[str]]:
    """Prepared rows that have something to learn, and notes on the others."""
    fills = f"prompt alone fills max_length {args.max_length}"
    notes = []
    if packed:
        notes.append(f"packed {len(given):,} {rows} into {len(prepared):,}")
        learns, lost = _packed(prepared)
        if lost:
            notes.append(f"{lost:,} {rows} train nothing, since their {fills}")
    else:
        learns = (
            _distinct(prepared, args)
            if len(prepared) and {*PAIR} <= {*prepared.column_names}
            else [True] * len(prepared)
        )
        if dropped := len(given) - len(prepared):
            notes.append(f"dropped {dropped:,} {rows} whose {fills}")
    if not any(learns):
        same = "the answers are the same tokens" if len(prepared) and not packed else f"the {fills}"
        raise HFTError(f"in every {rows.removesuffix('s')} {same}; raise max_length")
    if all(learns):
        return prepared, notes
    if not packed:
        dropped, length = learns.count(False), args.max_length
        notes.append(f"dropped {dropped:,} {rows} whose answers are the same tokens within max_length {length}")
    return prepared.select([index for index, one in enumerate(learns) if one]), notes


def _check_ids(dataset: Dataset, embedded: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse rows with an id that the embeddings have no row for."""
    columns = [column for column in TOKENS if column in dataset.column_names]

    def largest(*ids: list[list[int]]) -> dict[str, list[int]]:
        return {"largest": [max(map(max, filter(None, row)), default=0) for row in zip(*ids, strict=True)]}

    found = dataset.select_columns(columns).map(
        largest, batched=True, input_columns=columns, remove_columns=columns, desc="checking token ids"
    )["largest"][:]
    if wrong := [index for index in found if index >= embedded]:
        raise HFTError(
            f"{len(wrong):,} rows of dataset {name} hold {tokenizer.convert_ids_to_tokens(wrong[0])!r}, id {wrong[0]}, "
            f"and the embeddings have {embedded} rows; give the tokenizer that the model was trained with, or resize "
            "the embeddings first"
        )


def _distinct(pairs: Dataset, args: Any) -> list[bool]:
    """Of each pair, whether the tokens that are left after truncation differ; else its gradient is rounding noise."""
    kept = slice(None)
    if args.max_length is not None:
        kept = slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)
    columns = list(PAIR)

    def differ(prompts: list, chosen: list, rejected: list) -> dict[str, list[bool]]:
        rows = zip(prompts, chosen, rejected, strict=True)
        return {"differ": [(prompt + one)[kept] != (prompt + other)[kept] for prompt, one, other in rows]}

    found = pairs.select_columns(columns).map(
        differ, batched=True, input_columns=columns, remove_columns=columns, desc="comparing answers"
    )
    return found["differ"][:]


def _packed(rows: Dataset) -> tuple[list[bool], int]:
    """Of each packed row, whether it trains anything; and how many of the rows in them do not."""
    columns = [column for column in ("labels", "seq_lengths") if column in rows.column_names]

    def trains(batch: dict[str, list]) -> dict[str, list]:
        found: dict[str, list] = {"trains": [], "lost": []}
        for index, labels in enumerate(batch["labels"]):
            start, lost = 0, 0
            for length in batch.get("seq_lengths", [[]] * len(batch["labels"]))[index]:
                lost += all(label == -100 for label in labels[start : start + length])
                start += length
            found["trains"].append(any(label != -100 for label in labels))
            found["lost"].append(lost)
        return found

    found = rows.select_columns(columns).map(trains, batched=True, remove_columns=columns, desc="checking packed rows")
    return found["trains"][:], sum(found["lost"][:])


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
    return notes
