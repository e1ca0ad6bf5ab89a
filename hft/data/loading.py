"""Find a dataset's splits: a local file, a folder or a Hub id -> rows to train on and rows to evaluate on."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.config import DATASET_STATE_JSON_FILENAME, HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError, DatasetsError

from hft import __version__
from hft.config import RunConfig
from hft.data.rows import are_text, rendered
from hft.errors import HFTError, neighbor, reason
from hft.jsonl import read_jsonl
from hft.record.identity import digest
from hft.userfile import file_digest

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# A function of hft.data.rows: dataset and its name -> rows that a trainer reads, and notes.
ReadRows = Callable[[Dataset, str], tuple[Dataset, list[str]]]


@dataclass(frozen=True)
class LoadedData:
    """The rows of a run, in the form that its trainer takes; column `row` is a row's number in its split, from 0."""

    name: str  # of the dataset
    train: Dataset
    test: Dataset | None  # rows to evaluate on, None if none are wanted
    notes: list[str]  # what was dropped, which columns are not used, and which split is evaluated on, a line each
    fingerprint: dict[str, Any]  # what identifies the data files

    @property
    def is_text(self) -> bool:
        """Whether the rows are text, to which TRL applies no chat template, instead of conversations."""
        return are_text(self.train)


def load_split(name: str, split: str, config: str | None = None, revision: str | None = None) -> Dataset:
    """One split of a dataset, or a slice like `train[:1%]`, as it is stored; all of a file is the `train` split."""
    more = _source(name)
    more |= {} if "data_files" in more else {"name": config, "revision": revision}
    path, files = _local_path(name), []
    if path.exists():  # datasets may have cached other bytes of the same time and size
        found = fingerprint(name)
        more["cache_dir"] = str(HF_DATASETS_CACHE / f"hft-{__version__}" / digest(found))
        files = [path / file if path.is_dir() else path for file in found["files"]]
    with _loading(name):
        dataset = datasets.load_dataset(**more, **_cells_as_text(files), split=split)
    if len(dataset) == 0:
        raise HFTError(f"dataset {name}, split {split}, is empty")
    return dataset


def fingerprint(name: str, config: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What identifies a dataset: `files`, size and SHA-256 by path, or a Hub's `id`, `config` and `revision`."""
    path = _local_path(name)
    with _loading(name):
        if not path.exists():
            commit = datasets.load_dataset_builder(name, config, revision=revision).hash
            return {"id": name, "config": config, "revision": commit}
        files = {path.name: path}
        if path.is_dir():
            inside = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
            files = {key.as_posix(): file for key, file in inside.items() if not any(p[0] == "." for p in key.parts)}
        return {
            "files": {key: {"size": file.stat().st_size, "sha256": file_digest(file)} for key, file in files.items()}
        }


def load_data(run: RunConfig, read_rows: ReadRows, *, evaluate: bool) -> LoadedData:
    """The training rows and, if wanted, the rows to evaluate on (see `RunConfig.dataset_test_split`)."""
    name, config, wanted = run.dataset_name, run.dataset_config, run.dataset_test_split
    if isinstance(name, list):
        each = [replace(run, dataset_name=one, dataset_weights=None) for one in name]
        return mixture([load_data(one, read_rows, evaluate=evaluate) for one in each], run.dataset_weights)
    identity = fingerprint(name, config, run.dataset_revision)
    revision = identity.get("revision") or run.dataset_revision  # the commit, which a branch may leave meanwhile

    def rows(split: str) -> tuple[Dataset, list[str]]:
        dataset = rendered(load_split(name, split, config, revision), run.prompt, run.completion)
        try:
            return read_rows(dataset, name if split == "train" else f"{name} ({split})")
        except UnicodeDecodeError as error:  # a .json file is read without being decoded
            raise HFTError(f"dataset {name} is not UTF-8; save it as UTF-8") from error

    train, notes = rows(run.dataset_train_split)
    identity |= {"form": "text"} if are_text(train) else {}
    if not evaluate:
        return LoadedData(name, train, None, notes, identity)
    splits, source = ["train"], _source(name)
    if "data_files" not in source:
        with _loading(name):
            splits = datasets.get_dataset_split_names(source["path"], config, revision=revision)
    others = [split for split in splits if split not in _splits(run.dataset_train_split)]
    if wanted is None or (wanted == "test" and not others):
        train, test = _hold_out(name, train, run.eval_rows)
        note = f"evaluation: {len(test):,} rows held out of {run.dataset_train_split}"
    elif set(_splits(wanted)) <= set(splits):
        whole = {part for part in f"{run.dataset_train_split}+{wanted}".split("+") if part in splits}
        if both := whole & {*_splits(run.dataset_train_split)} & {*_splits(wanted)}:
            raise HFTError(f"split {min(both)} would train and be evaluated on; choose another --dataset_test_split")
        test, more = rows(wanted)
        count = min(run.eval_rows or len(test), len(test))
        note, notes = f"evaluation: {count:,} of {len(test):,} rows of split {wanted}", [*notes, *more]
        test = test.select(range(count))
    else:
        raise HFTError(
            f"dataset {name} has no split {wanted!r} to evaluate on, only {', '.join(splits)}: name one with "
            "--dataset_test_split, hold rows out with --dataset_test_split none, or pass --eval_strategy no"
        )
    if unused := [split for split in others if split not in _splits(wanted or "")]:
        note += f"; unused splits: {', '.join(unused)}"
    return LoadedData(name, train, test, list(dict.fromkeys([*notes, note])), identity)


def mixture(parts: list[LoadedData], weights: list[float] | None) -> LoadedData:
    """Several datasets as one: all rows of each, or rows drawn by weight until one of them has no more."""
    columns = [{*part.train.column_names} & {"messages", "prompt", "text"} for part in parts]
    if columns.count(columns[0]) < len(parts) or len({part.is_text for part in parts}) > 1:
        names = " and ".join(part.name for part in parts)
        raise HFTError(f"{names} hold rows in different forms; convert all to the same form")
    trains = [part.train.add_column("part", [index] * len(part.train)) for index, part in enumerate(parts)]
    odds = weights and [weight / sum(weights) for weight in weights]
    train = datasets.interleave_datasets(trains, odds, seed=0) if odds else datasets.concatenate_datasets(trains)
    notes, drawn = [], Counter(train["part"][:])
    for index, part in enumerate(parts):
        notes += [f"dataset {part.name}: {drawn[index]:,} of {len(part.train):,} training rows", *part.notes]
    tests = [part.test for part in parts if part.test is not None]
    name, test = " + ".join(part.name for part in parts), datasets.concatenate_datasets(tests) if tests else None
    identity = {"datasets": [part.fingerprint for part in parts], "weights": weights}
    return LoadedData(name, train.remove_columns("part"), test, notes, identity)


def _hold_out(name: str, train: Dataset, count: int | None) -> tuple[Dataset, Dataset]:
    if not count:
        remedy = "hold rows out with --eval_rows 64, or pass --eval_strategy no"
        raise HFTError(f"dataset {name} has no split to evaluate on: {remedy}")
    if count >= len(train):
        raise HFTError(f"cannot hold {count} rows out of the {len(train)} usable ones of {name}; lower --eval_rows")
    sources = train["row"][:]
    if len(set(sources)) == len(train):
        halves = train.train_test_split(test_size=count, seed=0)
        return halves["train"], halves["test"]
    # What was made of one row, such as both answers to a prompt, stays on one side.
    per_row = len(train) // len(set(sources))
    held = set(random.Random(0).sample(sorted(set(sources)), max(1, count // per_row)))
    sides = [[index for index, row in enumerate(sources) if (row in held) is side] for side in (False, True)]
    return train.select(sides[0]), train.select(sides[1])


def _splits(expression: str) -> list[str]:
    """The splits in `train[:90%]+validation`."""
    return [part.partition("[")[0].strip() for part in expression.split("+")]


def _local_path(name: str) -> Path:
    """The path that a dataset's name may be, checked where it can only be a path."""
    path = Path(name).expanduser()
    if (path.suffix in FORMATS or name.startswith((".", "/", "~", "data/"))) and not path.exists():
        hint = "; make the demo data with `hft demo data`" if name.startswith("data/") else ""
        raise HFTError(f"dataset {name} does not exist{neighbor(path) or hint}")
    if path.is_file() and path.suffix not in FORMATS:
        raise HFTError(f"dataset {name} must be {', '.join(FORMATS)}, not {path.suffix or 'a file without suffix'}")
    if path.is_file() and path.stat().st_size == 0:
        raise HFTError(f"dataset {name} is empty")
    return path


def _source(name: str) -> dict[str, Any]:
    """What `load_dataset` takes; with `data_files` it is one split, a file or what `Dataset.save_to_disk` wrote."""
    path = _local_path(name)
    if path.is_file():
        return {"path": FORMATS[path.suffix], "data_files": escape(str(path))}  # it is not a pattern
    if (path / DATASET_STATE_JSON_FILENAME).is_file():
        return {"path": "arrow", "data_files": escape(str(path)) + "/*.arrow"}
    return {"path": str(path) if path.is_dir() else name}


def _cells_as_text(files: list[Path]) -> dict[str, Any]:
    """What makes cells of CSV files text: pandas would take 02108 for a number and NA for null."""
    files = [file for file in files if file.suffix in FORMATS]
    if {file.suffix for file in files} != {".csv"}:
        return {}
    header = pd.read_csv(files[0], nrows=0).columns
    return {"features": Features(dict.fromkeys(header, Value("string"))), "keep_default_na": False}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Around what reads a dataset: what goes wrong there as one sentence."""
    try:
        yield
    except (DatasetsError, DatasetGenerationError, OSError, ValueError, TypeError, LookupError, pa.ArrowException) as e:
        if name.endswith(".jsonl"):
            read_jsonl(Path(name).expanduser())  # names the line
        cause = e.__cause__ if isinstance(e, DatasetGenerationError) and e.__cause__ else e
        raise HFTError(f"cannot load dataset {name}: {reason(cause)}") from e
