"""The JSON beside every checkpoint that says which half of it was frozen, and lets a machine check it."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from hft.errors import HFTError
from hft.methods.schedule import ScheduleConfig
from hft.selection.policies import Selection, SelectionConfig, describe_difference

NAME = "hft_manifest.json"
# Keys that earlier versions wrote under another name.
OLD_KEYS = {"trained": "trained_parameters", "frozen": "frozen_checksums", "shares": "trainable_fraction"}
PACKAGES = ("hft", "torch", "transformers", "trl", "accelerate", "datasets")


@dataclass
class Manifest:
    """One round's selection and what it takes to check it.

    Attributes:
        base: the model that the round started from, an absolute path or a Hub id.
        revision: the Hub revision of the base, where one was asked for.
        selection: the config that the selection was made from, with seed and round.
        trained_units: names of the trained units, in model order.
        frozen_units: names of the frozen units, in model order.
        trained_parameters: names of the trained parameters, those outside the layers included.
        frozen_checksums: SHA-256 of each frozen parameter, by name (`hft.model.weights.checksum`). A partly frozen one
            is among the trained parameters too; its checksum is that of its frozen elements.
        masks: SHA-256 of the mask of each partly frozen parameter; the masks are in `hft_masks.safetensors`.
        trainable_fraction: that of the layers and of the whole model.
        update: how the trained weights moved, as `UpdateConfig.record` gives it.
        earlier: base, selection and frozen units of the rounds that led to the base, oldest first.
        schedule: how the trained units changed within the round, if they did: `config`, and as soon as it has begun
            `steps`, `fractions` and `history` (see `hft.methods.callback.Schedule.record`). Units that trained at any
            step count as trained; those that never did count as frozen once the round is over.
        versions: the packages that made it.
        tuned: of a Half-Reset, the model that was reset: its tensors are those among `trained`, unchanged.
        moved: parameters that an adapter's training changed in memory; the adapter's own, and none of the base.
    """

    base: str
    selection: dict
    trained_units: list[str]
    frozen_units: list[str]
    trained_parameters: list[str]
    frozen_checksums: dict[str, str]
    trainable_fraction: dict[str, float]
    earlier: list[dict] = field(default_factory=list)
    revision: str | None = None
    masks: dict[str, str] = field(default_factory=dict)
    update: dict = field(default_factory=lambda: {"update": "plain"})
    moved: list[str] = field(default_factory=list)
    tuned: str | None = None
    schedule: dict = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    )

    @classmethod
    def of(
        cls,
        selection: Selection,
        base: str,
        checksums: dict[str, str],
        *,
        tuned: str | None = None,
        revision: str | None = None,
        update: dict | None = None,
        schedule: ScheduleConfig | None = None,
    ) -> Manifest:
        """The manifest of a selection, given the checksums of the frozen parameters.

        A base that has a manifest itself makes this one round more of a sequence.
        """
        units = selection.anatomy.units
        return cls(
            base=absolute_or_hub_id(base),
            tuned=tuned and absolute_or_hub_id(tuned),
            revision=revision,
            selection=asdict(selection.config),
            trained_units=[unit.name for unit in units if selection.trains(unit)],
            frozen_units=[unit.name for unit in units if not selection.trains(unit)],
            trained_parameters=selection.trained_parameters,
            frozen_checksums=checksums,
            trainable_fraction={"layers": selection.fraction_of_layers, "model": selection.fraction_of_model},
            masks={name: mask.digest() for name, mask in selection.frozen_masks.items()},
            earlier=rounds_so_far(base),
            update=update or {"update": "plain"},
            schedule={"config": asdict(schedule)} if schedule and schedule.schedule != "none" else {},
        )

    def save(self, folder: str | Path) -> Path:
        """Write it into a folder, in one step."""
        path = Path(folder) / NAME
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return temporary.replace(path)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a checkpoint or output folder.

        Raises:
            HFTError: there is none, or it is not one.
        """
        path = Path(folder) / NAME
        try:
            content = json.loads(path.read_text())
            return cls(**{OLD_KEYS.get(key, key): value for key, value in content.items()})
        except FileNotFoundError:
            raise HFTError(
                f"{folder} has no {NAME}, so there is nothing to verify: it is a merge, or no folder that hft trained"
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise HFTError(f"{path} is no manifest: {error}") from error

    def check_resumable(self, other: Manifest, folder: str | Path) -> None:
        """Refuse to go on from a checkpoint whose selection, update or base is not this run's.

        torch would load its optimizer state without complaint, since all halves are equally large, and train on with
        another matrix's moments.

        Args:
            other: the manifest of the checkpoint.
            folder: the checkpoint, for the message.
        """
        ours, theirs = self.selection, other.selection
        if ("adapter" in ours or "adapter" in theirs) and ours != theirs:
            keys = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
            changes = [f"{key} {theirs.get(key, 'unset')} there, {ours.get(key, 'unset')} here" for key in keys]
            raise HFTError(
                f"cannot resume from {folder}: it was trained with another adapter ({', '.join(changes[:3])}); give "
                "the same settings, another --output_dir, or --resume_from_checkpoint none"
            )
        if any(getattr(self, n) != getattr(other, n) for n in ("frozen_units", "masks")) or (
            self.frozen_checksums.keys() != other.frozen_checksums.keys()
        ):
            ours, theirs = SelectionConfig(**self.selection), SelectionConfig(**other.selection)
            difference = describe_difference(ours, theirs) or "another model"
            raise HFTError(
                f"cannot resume from {folder}: it was trained with another selection ({difference}); give the same "
                "settings, another --output_dir, or --resume_from_checkpoint none"
            )
        if self.update != other.update:
            theirs, ours = (", ".join(f"{k} {v}" for k, v in each.update.items()) for each in (other, self))
            raise HFTError(
                f"cannot resume from {folder}: its weights moved by another rule ({theirs} there, {ours} here); give "
                "the same settings, another --output_dir, or --resume_from_checkpoint none"
            )
        ours, theirs = (m.schedule.get("config", {"schedule": "none"}) for m in (self, other))
        if ours != theirs:
            keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
            difference = ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
            raise HFTError(
                f"cannot resume from {folder}: it was trained with another schedule ({difference}); give the same "
                "settings, another --output_dir, or --resume_from_checkpoint none"
            )
        # With nothing frozen there are no checksums to tell two bases apart.
        if self.frozen_checksums != other.frozen_checksums or (not self.frozen_checksums and self.base != other.base):
            different = next(
                (name for name in self.frozen_checksums if self.frozen_checksums[name] != other.frozen_checksums[name]),
                "path",
            )
            raise HFTError(
                f"cannot resume from {folder}: its base was {other.base}, whose {different} differs from that of "
                f"{self.base}; give the same base, another --output_dir, or --resume_from_checkpoint none"
            )


def rounds_so_far(base: str | Path) -> list[dict]:
    """The rounds that a base has been through by its own manifest, oldest first; none if it has no manifest."""
    if not base or not (Path(base) / NAME).exists():
        return []
    manifest = Manifest.load(base)
    last = {name: getattr(manifest, name) for name in ("base", "selection", "frozen_units")}
    return [*manifest.earlier, last]


def absolute_or_hub_id(model: str) -> str:
    """A model's name as it holds wherever it is read: an absolute path or a Hub id."""
    return str(Path(model).resolve()) if model and Path(model).is_dir() else model
