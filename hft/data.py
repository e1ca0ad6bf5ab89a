"""Datasets for the stages: local files, folders or Hub ids, checked before anything large is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from trl import extract_prompt, maybe_convert_to_chatml

from hft.config import RunConfig
from hft.errors import HFTError
from hft.machine import say

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """One split of a dataset, as it is stored.

    Args:
        name: a .jsonl, .json or .parquet file (all of it is the `train` split), a folder with one file a split,
            or a Hub id.
        split: name of the split, or a slice like `train[:1%]`.
        config: the Hub dataset's configuration, where it has several.

    Raises:
        HFTError: it cannot be found or read, or is empty.
    """
    path = Path(name)
    if (path.suffix in FORMATS or name.startswith((".", "/"))) and not path.exists():
        raise HFTError(f"dataset {name} does not exist")
    try:
        if path.is_file():
            if path.suffix not in FORMATS:
                raise HFTError(f"dataset {name}: read are {', '.join(FORMATS)}, not {path.suffix or 'this file'}")
            if path.stat().st_size == 0:
                raise HFTError(f"dataset {name} is empty")
            dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split=split)
        else:
            dataset = load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except (DatasetNotFoundError, DatasetGenerationError, OSError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        hint = "; make the demo data with `hft demo data`" if name.startswith("data/") else ""
        raise HFTError(f"cannot load dataset {name}: {reason}{hint}") from error
    except ValueError as error:  # an unknown split or configuration
        raise HFTError(f"dataset {name}: {' '.join(str(error).split())}") from error
    if len(dataset) == 0:
        raise HFTError(f"dataset {name}, split {split}, is empty")
    return dataset


def has_split(name: str, split: str, config: str | None = None) -> bool:
    """Whether a dataset has a split; a single file has only `train`."""
    return split == "train" if Path(name).is_file() else split in get_dataset_split_names(name, config)


def load_data(
    run: RunConfig, rows: Callable[[Dataset, str], Dataset], *, evaluate: bool
) -> tuple[Dataset, Dataset | None]:
    """The training rows and, if wanted, the rows to evaluate on (see `RunConfig.eval_rows`).

    Args:
        run: names the dataset and its splits.
        rows: brings a dataset into the form a stage needs, `sft_rows` or `preference_rows`.
        evaluate: whether rows to evaluate on are wanted.

    Returns:
        Two datasets, the second None if it is not wanted.
    """
    name = run.dataset_name
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    train = rows(load_split(name, run.dataset_train_split, run.dataset_config), name)
    if not evaluate:
        return train, None
    if has_split(name, run.dataset_test_split, run.dataset_config):
        test = rows(load_split(name, run.dataset_test_split, run.dataset_config), name)
        return train, test.select(range(min(run.eval_rows or len(test), len(test))))
    if not run.eval_rows:
        raise HFTError(
            f"dataset {name} has no {run.dataset_test_split} split: hold rows out with --eval_rows 64, or pass "
            "--eval_strategy no"
        )
    if run.eval_rows >= len(train):
        raise HFTError(f"cannot hold {run.eval_rows} rows out of the {len(train)} of {name}; lower --eval_rows")
    halves = train.train_test_split(test_size=run.eval_rows, seed=0)
    return halves["train"], halves["test"]


def sft_rows(dataset: Dataset, name: str) -> Dataset:
    """Demonstrations in one of the forms that `SFTTrainer` knows, and no other column.

    Args:
        dataset: with `messages`, ShareGPT's `conversations`, or `prompt` and `completion`, as text or as messages.
        name: for messages to people.

    Raises:
        HFTError: another form, or a row without an assistant's turn, which has nothing to learn from.
    """
    columns = set(dataset.column_names)
    if "conversations" in columns and "messages" not in columns:
        dataset = dataset.select_columns(["conversations"]).map(
            _from_sharegpt, remove_columns=["conversations"], desc="conversations as messages"
        )
        columns = {"messages"}
    if "messages" in columns:
        dataset, answers = dataset.select_columns(["messages"]), "messages"
    elif {"prompt", "completion"} <= columns:
        dataset, answers = dataset.select_columns(["prompt", "completion"]), "completion"
        if isinstance(dataset[0]["prompt"], str):
            dataset = dataset.map(_as_chat, desc="prompt and completion as a chat")
    else:
        hint = "; it looks like preferences, which are for DPO" if {"chosen", "rejected"} <= columns else ""
        raise HFTError(
            f"dataset {name} has columns {', '.join(sorted(columns))}; needed are messages, or prompt and "
            f"completion{hint}"
        )
    if not _is_chat(dataset[0][answers]):
        raise HFTError(
            f"dataset {name}: {answers} must be a list of {{role, content}}, got {dataset[0][answers]!r:.80}"
        )

    def teaches(batch: dict) -> dict:
        return {"teaches": [any(m["role"] == "assistant" and m["content"] for m in row) for row in batch[answers]]}

    teach = dataset.map(teaches, batched=True, remove_columns=dataset.column_names, desc="checking rows")["teaches"]
    if not all(teach):
        rows = [index for index, row in enumerate(teach) if not row]
        raise HFTError(
            f"dataset {name}: {len(rows)} rows have no assistant turn, the first is row {rows[0]}; drop them"
        )
    return dataset


def preference_rows(dataset: Dataset, name: str) -> Dataset:
    """Preferences as conversations with an explicit prompt, the one form that `DPOTrainer` always reads alike.

    UltraFeedback's common layouts all come down to it: whole dialogues in `chosen` and `rejected`, beside a `prompt`
    that is text (HuggingFaceH4, allenai, argilla) or absent (trl-lib); so do prompt, chosen and rejected as messages
    or as text. `DPOTrainer` itself fails on the first kind.

    Args:
        dataset: with `chosen` and `rejected`, and mostly `prompt`.
        name: for messages to people.

    Raises:
        HFTError: another form, or no pair to learn from. Single pairs that are equal or lack an answer are dropped,
            as UltraFeedback has some; their number is printed.
    """
    columns = set(dataset.column_names)
    needed = (
        "needed are chosen and rejected as messages with the prompt in front or in a column of its own, or prompt, "
        "chosen and rejected as text"
    )
    if not {"chosen", "rejected"} <= columns:
        hint = "; it looks like demonstrations, which are for SFT" if {"messages", "completion"} & columns else ""
        raise HFTError(f"dataset {name} has columns {', '.join(sorted(columns))}; {needed}{hint}")
    first = dataset[0]
    prompt, chosen = first.get("prompt"), first["chosen"]
    if _is_chat(chosen) and chosen and chosen[0]["role"] != "assistant":
        dataset = dataset.select_columns(["chosen", "rejected"]).map(extract_prompt, desc="parting prompt and answers")
    elif _is_chat(prompt) and _is_chat(chosen):
        dataset = dataset.select_columns(["prompt", "chosen", "rejected"])
    elif isinstance(prompt, str) and (isinstance(chosen, str) or _is_chat(chosen)):
        dataset = dataset.select_columns(["prompt", "chosen", "rejected"]).map(_as_chat, desc="text as chats")
    else:
        raise HFTError(f"dataset {name} has chosen = {chosen!r:.60} and prompt = {prompt!r:.60}; {needed}")

    def fault(batch: dict) -> dict:
        pairs = zip(batch["chosen"], batch["rejected"], strict=True)
        return {"fault": [_fault(*pair) for pair in pairs]}

    faults = dataset.map(fault, batched=True, remove_columns=dataset.column_names, desc="checking pairs")["fault"]
    good = [index for index, found in enumerate(faults) if not found]
    counts = ", ".join(f"{count:,} {found}" for found, count in Counter(filter(None, faults)).items())
    if not good:
        raise HFTError(f"dataset {name} has no pair to learn from: {counts}")
    if counts:
        say(f"dataset {name}: dropped {counts}, of {len(faults):,} pairs")
    return dataset.select(good)


def _fault(chosen: list[dict], rejected: list[dict]) -> str:
    if not all(messages and (messages[-1]["content"] or "").strip() for messages in (chosen, rejected)):
        return "with an empty answer"
    return "with equal answers" if chosen == rejected else ""


def _from_sharegpt(row: dict) -> dict:
    messages = maybe_convert_to_chatml(row)["messages"]
    roles = {"human": "user", "gpt": "assistant"}
    return {"messages": [{"role": roles.get(m["role"], m["role"]), "content": m["content"]} for m in messages]}


def _as_chat(row: dict) -> dict:
    """Text as messages: the prompt is the user's, every other column the assistant's."""
    return {
        column: value
        if not isinstance(value, str)
        else [{"role": "user" if column == "prompt" else "assistant", "content": value}]
        for column, value in row.items()
    }


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
