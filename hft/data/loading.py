"""Find a dataset's splits: a local file, a folder or a Hub id -> rows to train on and rows to evaluate on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from hft.config import RunConfig
from hft.data.identity import fingerprint
from hft.errors import HFTError, reason

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
REFUSALS = (DatasetsError, DatasetGenerationError, OSError, ValueError, TypeError, LookupError, pa.ArrowException)
# Splits to evaluate on, the first that exists; those of `train_sft` are `test_sft` and so on.
EVALUATION_SPLITS = (
    "test",
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "evaluation",
    "testing",
    "heldout",
    "held_out",
)

Rows = Callable[[Dataset, str], tuple[Dataset, list[str]]]


@dataclass(frozen=True)
class LoadedData:
    """The rows of a run, in the form that its trainer takes.

    Attributes:
        name: of the dataset, for messages.
        train: rows to train on; the column `row` is a row's number in its split, counted from 0.
        test: rows to evaluate on, None if none are wanted.
        notes: what was dropped, which columns are not used, and which split is evaluated on, one line per finding.
        fingerprint: what identifies the data files (`hft.data.fingerprint`).
    """

    name: str
    train: Dataset
    test: Dataset | None
    notes: list[str] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)


def load_split(name: str, split: str, config: str | None = None, revision: str | None = None) -> Dataset:
    """One split of a dataset, as it is stored.

    Args:
        name: a .jsonl, .json or .parquet file (all of it is the `train` split), a folder with one file per split,
            or a Hub id.
        split: name of the split, or a slice like `train[:1%]`.
        config: the Hub dataset's configuration, if it has several.
        revision: the Hub dataset's branch, tag or commit, if it is not to be the main branch.

    Raises:
        HFTError: it is not found, cannot be read, or is empty.
    """
    path = _local(name)
    try:
        if path.is_file():
            dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split=split)
        else:
            where = str(path) if path.is_dir() else name
            dataset = load_dataset(where, config, split=split, revision=revision)
    except REFUSALS as error:
        raise _cannot_load(name, error) from error
    if len(dataset) == 0:
        raise HFTError(f"dataset {name}, split {split}, is empty")
    return dataset


def split_names(name: str, config: str | None = None, revision: str | None = None) -> list[str]:
    """The splits of a dataset; a single file has only `train`.

    Raises:
        HFTError: it is not found or cannot be read.
    """
    path = _local(name)
    try:
        if path.is_file():
            return ["train"]
        return get_dataset_split_names(str(path) if path.is_dir() else name, config, revision=revision)
    except REFUSALS as error:
        raise _cannot_load(name, error) from error


def load_data(run: RunConfig, objective_rows: Rows, *, evaluate: bool) -> LoadedData:
    """The training rows and, if wanted, the rows to evaluate on (see `RunConfig.eval_rows`).

    Args:
        run: names the dataset and its splits.
        objective_rows: brings a dataset into the form an objective needs, `sft_rows` or `preference_rows`.
        evaluate: whether rows to evaluate on are wanted.

    Raises:
        HFTError: the dataset or a split is not found, a row cannot be trained on, or no row is left to evaluate on.
    """
    name = run.dataset_name

    def rows(split: str) -> tuple[Dataset, list[str]]:
        dataset = load_split(name, split, run.dataset_config, run.dataset_revision)
        return objective_rows(dataset, name if split == "train" else f"{name} ({split})")

    train, notes = rows(run.dataset_train_split)
    try:
        identity = fingerprint(name, run.dataset_config, run.dataset_revision)
    except REFUSALS as error:
        raise _cannot_load(name, error) from error
    if not evaluate:
        return LoadedData(name, train, None, notes, identity)
    names = split_names(name, run.dataset_config, run.dataset_revision)
    others = [split for split in names if split not in _splits(run.dataset_train_split)]
    chosen = evaluation_split(run, others)
    if chosen is None:
        train, test = _hold_out(name, train, run.eval_rows)
        unused = f"; unused splits: {', '.join(others)}" if others else ""
        notes.append(f"evaluation: {len(test):,} rows held out of {run.dataset_train_split}{unused}")
        return LoadedData(name, train, test, notes, identity)
    test, more = rows(chosen)
    wanted = min(run.eval_rows or len(test), len(test))
    rest = [split for split in others if split not in _splits(chosen)]
    unused = f"; unused splits: {', '.join(rest)}" if rest else ""
    note = f"evaluation: {wanted:,} of {len(test):,} rows of split {chosen}{unused}"
    notes = list(dict.fromkeys([*notes, *more, note]))
    return LoadedData(name, train, test.select(range(wanted)), notes, identity)


def evaluation_split(run: RunConfig, splits: list[str]) -> str | None:
    """The split to evaluate on: `dataset_test_split` if it is given, else the first under a usual name, or None.

    Args:
        run: its `dataset_test_split` may be a slice like `validation[:64]` or `train[90%:]`.
        splits: those of the dataset, without the one that is trained on.

    Raises:
        HFTError: `dataset_test_split` does not exist.
    """
    asked, train = run.dataset_test_split, run.dataset_train_split
    if asked:
        if all(split in [*splits, *_splits(train)] for split in _splits(asked)):
            return asked
        raise HFTError(
            f"dataset {run.dataset_name} has no split {asked!r} to evaluate on, only {', '.join([train, *splits])}"
        )
    [base, *_] = _splits(train)
    usual = [base.replace("train", name) for name in EVALUATION_SPLITS if "train" in base] + list(EVALUATION_SPLITS)
    return next((name for name in usual if name in splits), None)


def _hold_out(name: str, train: Dataset, count: int | None) -> tuple[Dataset, Dataset]:
    if not count:
        raise HFTError(
            f"dataset {name} has no split to evaluate on: hold rows out with --eval_rows 64, or pass --eval_strategy no"
        )
    if count >= len(train):
        raise HFTError(f"cannot hold {count} rows out of the {len(train)} of {name}; lower --eval_rows")
    halves = train.train_test_split(test_size=count, seed=0)
    return halves["train"], halves["test"]


def _splits(expression: str) -> list[str]:
    """The splits in `train[:90%]+validation`."""
    return [part.partition("[")[0].strip() for part in expression.split("+")]


def _local(name: str) -> Path:
    """The path that a dataset's name may be, checked where it can only be a path."""
    path = Path(name).expanduser()
    if (path.suffix in FORMATS or name.startswith((".", "/", "~"))) and not path.exists():
        raise HFTError(f"dataset {name} does not exist{_hint(name)}")
    if path.is_file() and path.suffix not in FORMATS:
        raise HFTError(f"dataset {name} must be {', '.join(FORMATS)}, not {path.suffix or 'a file without suffix'}")
    if path.is_file() and path.stat().st_size == 0:
        raise HFTError(f"dataset {name} is empty")
    return path


def _hint(name: str) -> str:
    return "; make the demo data with `hft demo data`" if name.startswith("data/") else ""


def _cannot_load(name: str, error: Exception) -> HFTError:
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return HFTError(f"cannot load dataset {name}: {reason(cause)}{_hint(name)}")
