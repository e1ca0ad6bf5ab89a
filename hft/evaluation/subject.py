"""A model to score: its weights, its adapter, what it was tuned from, and what identifies all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError, reason
from hft.record.identity import digests_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model to score."""

    name: str  # as it was given
    weights: Path  # folder of the model itself, or of the base under an adapter
    adapter: Path | None
    base: str | None  # what it was tuned from
    revision: str | None  # the commit, tag or branch of a base on the Hub
    inputs: dict[str, Any]  # SHA-256 of what is in the model's folder and, for an adapter, in its base's

    @property
    def tokenizer(self) -> Path:
        return self.adapter or self.weights

    def base_subject(self) -> Subject:
        from hft.model.weights import local_folder

        return subject_of(str(local_folder(self.base, self.revision)))


def subject_of(model: str, base: str | None = None) -> Subject:
    """Find a model, its adapter and what it was tuned from."""
    from hft.model.weights import local_folder
    from hft.record.manifest import MANIFEST_NAME, Manifest
    from hft.record.verification import ADAPTER_NAME

    folder, revision = local_folder(model), None
    if base is None and (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        base, revision = manifest.base, manifest.revision
    is_adapter = (folder / ADAPTER_NAME).exists()
    if is_adapter and base is None:
        raise HFTError(f"{model} is an adapter without a manifest; name its base with --base")
    weights = local_folder(base, revision) if is_adapter else folder
    inputs = {"model": _identity(model, folder)} | ({"base": _identity(base, weights)} if is_adapter else {})
    return Subject(model, weights, folder if is_adapter else None, base, revision, inputs)


def _identity(name: str, folder: Path) -> dict[str, str]:
    return digests_of(folder) if Path(name).is_dir() else {"commit": folder.name}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise HFTError(f"cannot load the tokenizer of {folder}: {reason(error)}") from error


def folder_of(model: str) -> Path:
    """Where a model's scores are saved: its own folder; for a Hub id one that no run is called, as the Hub's cache."""
    return Path(model) if Path(model).is_dir() else Path("runs", f"models--{model.replace('/', '--')}")
