"""The JSON beside every checkpoint that says which half of it was frozen, with checksums."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft import __version__
from hft.errors import HFTError, neighbor, reason
from hft.machine import is_main, world_size
from hft.record.identity import base_digests, cannot_resume, check_same_run, identity_of

if TYPE_CHECKING:
    from hft.model.anatomy import Unit
    from hft.selection import Selection

MANIFEST_NAME = "hft_manifest.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")


@dataclass
class Manifest:
    """One round's selection, with the checksums that verify needs."""

    base: str  # the model that the round started from, an absolute path or a Hub id
    selection: dict[str, Any]  # the config that it was made from, with seed and round; or the adapter's settings
    trained_units: list[str]  # names, in model order
    frozen_units: list[str]  # names of the others
    trained_parameters: list[str]  # names, those outside the layers included
    # SHA-256 of each frozen parameter, by name (`hft.model.weights.checksum`). A partly frozen one is among the trained
    # parameters too; its checksum is that of its frozen elements.
    frozen_checksums: dict[str, str]
    trainable_fraction: dict[str, float]  # of the layers and of the whole model
    counts: dict[str, list[int]] = field(default_factory=dict)  # by block, how many of its units train, and of how many
    # Base, selection and frozen units of the rounds that led to the base, oldest first.
    earlier: list[dict] = field(default_factory=list)
    base_digests: dict[str, str] = field(default_factory=dict)  # what its files were (`hft.record.identity`)
    revision: str | None = None  # the Hub revision of the base, if one was asked for
    masks: dict[str, str] = field(default_factory=dict)  # SHA-256 of each partly frozen parameter's mask (`MASKS_NAME`)
    update: dict = field(default_factory=lambda: {"update": "plain"})  # how weights moved (`Update.record()`)
    strategy: dict = field(default_factory=dict)  # what each step did beside its rows (`Strategy.record()`)
    # Parameters that changed in memory, of those that are not in the folder: none but an adapter's own.
    moved: list[str] = field(default_factory=list)
    only_trained: bool = False  # the folder holds only what trains, also of a tensor (`save_only_trained`)
    compact: bool = False  # a checkpoint's optimizer state is that of trained elements, not of whole tensors
    tuned: str | None = None  # of a Half-Reset, the model that was reset: its tensors are the trained ones, unchanged
    # How the trained units changed within the round, if they did: `config`, and once it has started `steps`,
    # `fractions` and `history`. Units that trained at any step count as trained; those that never did count as frozen
    # once the round is over (`finished`).
    schedule: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)  # what identifies the data files (`hft.data.fingerprint`)
    tokens: str = ""  # SHA-256 of the tokens that it trains on (`hft.data.tokens_digest`); empty if unknown
    processes: int = 0  # how many trained, each with a random state in a checkpoint; 0 if unknown
    versions: dict[str, str] = field(
        default_factory=lambda: (
            {"python": platform.python_version(), "hft": __version__} | {name: version(name) for name in PACKAGES}
        )
    )

    @classmethod
    def of(cls, selection: Selection, base: str, checksums: dict[str, str], **record: Any) -> Manifest:
        """The manifest of a selection, with the checksums of what is frozen; one more round where the base has one."""
        units = selection.anatomy.units
        if tuned := record.get("tuned"):
            record["tuned"] = absolute_or_hub_id(tuned)
        return cls(
            base=absolute_or_hub_id(base),
            base_digests=base_digests(base) if is_main() else {},
            selection=selection.record(),
            trained_units=[unit.name for unit in units if selection.trains(unit)],
            frozen_units=[unit.name for unit in units if not selection.trains(unit)],
            trained_parameters=selection.trained_parameters,
            frozen_checksums=checksums,
            trainable_fraction={"layers": selection.fraction_of_layers, "model": selection.fraction_of_model},
            counts={block: list(count) for block, count in selection.counts().items()},
            masks={name: mask.digest() for name, mask in selection.frozen_masks.items()},
            compact=bool(selection.frozen_masks),
            earlier=rounds_so_far(base),
            processes=world_size(),
            **record,
        )

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter trained, which is not among the base's weights."""
        return "adapter" in self.selection

    @property
    def identity(self) -> dict[str, Any]:
        schedule = self.schedule.get("config")
        return identity_of(self.selection, self.update, schedule, self.data, self.strategy, self.base_digests)

    def save(self, folder: str | Path) -> Path:
        return write_json(Path(folder) / MANIFEST_NAME, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a checkpoint or output folder; raises an `HFTError` if it is missing or invalid."""
        path = Path(folder) / MANIFEST_NAME
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            why = f"it is a merge, not a folder that hft trained, or not there{neighbor(path.parent)}"
            raise HFTError(f"{folder} has no {MANIFEST_NAME}, so there is nothing to verify: {why}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise HFTError(f"{path} is not a valid manifest: {reason(error)}") from error

    def finished(self, units: Sequence[Unit], trained: frozenset[str], checksums: Mapping[str, str]) -> Manifest:
        """The manifest once a schedule is over, which counts what it never trained as frozen.

        `trained` names units, and parameters outside the layers; `checksums` are the base's, of what trains.
        """
        touched = {name for unit in units if unit.name in trained for name in unit.parameters} | trained
        never = [name for name in self.trained_parameters if name not in touched]
        in_blocks = Counter(unit.block for unit in units if unit.name in trained)
        return replace(
            self,
            trained_units=[unit.name for unit in units if unit.name in trained],
            frozen_units=[unit.name for unit in units if unit.name not in trained],
            counts={block: [in_blocks[block], total] for block, (_, total) in self.counts.items()},
            trained_parameters=[name for name in self.trained_parameters if name in touched],
            frozen_checksums=self.frozen_checksums | {name: checksums[name] for name in never},
        )

    def check_resumable(self, checkpoint: str | Path) -> None:
        """Refuse to resume from a checkpoint of another run or with another base; for once the base is loaded."""
        other = Manifest.load(checkpoint)
        check_same_run(self.identity, other.identity, checkpoint)
        if self.tokens and other.tokens not in ("", self.tokens):
            why = "the same rows have become other tokens since then, as with a chat template that writes the date, or "
            raise cannot_resume(checkpoint, f"{why}another tokenizer")
        # A policy in a file of the user's own may have changed while its config stayed the same.
        same_names = self.frozen_checksums.keys() == other.frozen_checksums.keys()
        if not same_names or (self.frozen_units, self.masks) != (other.frozen_units, other.masks):
            why = "the same settings froze other units there, so the policy or the model has changed"
            raise cannot_resume(checkpoint, why)
        if self.compact and not other.compact:
            why = "an earlier version of hft kept there the optimizer's state of whole tensors, of which now only the "
            raise cannot_resume(checkpoint, f"{why}trained elements have one")
        names = [n for n, digest in self.frozen_checksums.items() if other.frozen_checksums[n] != digest]
        if names or (not (self.frozen_checksums or other.base_digests) and self.base != other.base):
            different = names[0] if names else "path"
            why = f"its base was {other.base}, whose {different} differs from that of {self.base}"
            raise cannot_resume(checkpoint, why, "the same base, ")


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file in one step."""
    return write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a text file in one step: a reader sees the old or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def rounds_so_far(base: str | Path) -> list[dict]:
    """The rounds of a base by its manifest, oldest first; none if it has no manifest."""
    if not base or not (Path(base) / MANIFEST_NAME).exists():
        return []
    manifest = Manifest.load(base)
    last = {name: getattr(manifest, name) for name in ("base", "selection", "frozen_units")}
    return [*manifest.earlier, last]


def absolute_or_hub_id(model: str) -> str:
    """A model's name that is valid in any working directory."""
    return str(Path(model).resolve()) if model and Path(model).is_dir() else model
