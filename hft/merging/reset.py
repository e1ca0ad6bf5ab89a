"""`hft reset`: Half-Reset (paper section 2, Table 9), in which half of a tuned model goes back to its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hft.config import Keys, fill, option, read_arguments, to_yaml
from hft.errors import HFTError
from hft.machine import indented, say
from hft.merging.checkpoint import Checkpoint, check_alike, check_out, new_folder, why_not_base, write_model
from hft.merging.operators import TensorOf
from hft.model.anatomy import anatomy_of, meta_model
from hft.model.weights import checksum
from hft.record.card import write_card
from hft.record.manifest import Manifest, rounds_so_far
from hft.record.verification import check_base, verify_folder
from hft.runs.result import CONFIG_NAME, PICTURE_NAME
from hft.selection import Selection, SelectionConfig, select
from hft.selection.masks import frozen_values, save_masks
from hft.selection.stored import check_scored_base


@dataclass
class ResetConfig:
    """What `hft reset` works on; the selection's keys are `SelectionConfig`'s."""

    tuned: str | None = option("The fine-tuned model: a folder or a Hub id.")
    base: str | None = option("The model that it was tuned from.")
    out: str | None = option("Folder for the result.")
    method: str | None = option("No effect; accepted so that a method's file can be given.")
    max_shard_size: str = option("Largest size of a file.", "5GB")


def main(arguments: Sequence[str]) -> int:
    """Reset what HFT would freeze to the base, after the tuning; 1 if a reset tensor is not the base's."""
    groups = {"reset": (ResetConfig,), "selection": (SelectionConfig,)}
    arguments = read_arguments(arguments, "hft reset", "Reset half of a tuned model to its base.", groups)
    given, _ = arguments.resolve(Keys((ResetConfig, SelectionConfig)))
    if rounds := rounds_so_far(given.get("base") or ""):
        given = {"round": rounds[-1]["selection"]["round"] + 1} | given
    config, chosen = fill(ResetConfig, given), fill(SelectionConfig, given)
    if not (config.tuned and config.base and config.out):
        raise HFTError("tuned, base and out are needed: give --tuned T --base B --out O, or a recipe with --config")
    out, tuned, base = Path(config.out), Checkpoint.open(config.tuned), Checkpoint.open(config.base)
    check_out(out, [tuned.folder, base.folder])
    check_alike(tuned, base)
    check_base(config.base)
    if sentence := why_not_base(tuned, base):
        raise HFTError(sentence)
    check_scored_base(chosen, config.base)
    selection = select(anatomy_of(meta_model(base.config)), chosen)
    say(f"what this selection trains stays tuned; what it freezes goes back to {base.name}")
    say(indented(selection.summary()))
    tensor_of = resetter(selection, tuned, base)
    check_reset(selection, tuned, base, tensor_of)
    with new_folder(out) as folder:
        say(write_model(folder, tuned, tensor_of, max_shard_size=config.max_shard_size))
        write_record(folder, selection, tuned, base)
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    found = verify_folder(out)
    settings = {key: value for key, value in given.items() if key != "out"}
    write_card(out, Manifest.load(out), settings, ("hft", "half-reset"), verified=found.counts())
    say("verify", indented(found.report()), "", str(out))
    return 0 if found.ok else 1


def resetter(selection: Selection, tuned: Checkpoint, base: Checkpoint) -> TensorOf:
    frozen, masks = set(selection.frozen_parameters), selection.frozen_masks

    def reset(name: str) -> torch.Tensor:
        if name in masks:
            return torch.where(masks[name].tensor(), base.weights[name], tuned.weights[name])
        return (base if name in frozen else tuned).weights[name]

    return reset


def check_reset(selection: Selection, tuned: Checkpoint, base: Checkpoint, reset: TensorOf) -> None:
    """Refuse a reset that cannot be written or would change nothing."""
    names = [*selection.frozen_parameters, *selection.frozen_masks]
    if not names:
        raise HFTError(f"the {selection.config.policy} policy freezes nothing here, so nothing would be reset")
    if recast := [name for name in names if base.specs[name].dtype != tuned.specs[name].dtype]:
        a, b = base.specs[recast[0]].dtype, tuned.specs[recast[0]].dtype
        raise HFTError(f"{recast[0]} is stored in {a} in {base.name} and in {b} in {tuned.name}; convert one of them")
    if all((reset(name) == tuned.weights[name]).all() for name in names):
        raise HFTError(f"{tuned.name} already has the base's values there: nothing would be reset")


def write_record(folder: Path, selection: Selection, tuned: Checkpoint, base: Checkpoint) -> None:
    from hft.record.picture import plot_selection

    masks = selection.frozen_masks
    names = [*selection.frozen_parameters, *masks]
    checksums = {name: checksum(frozen_values(base.weights[name], masks.get(name))) for name in names}
    Manifest.of(selection, base.name, checksums, tuned=tuned.name).save(folder)
    save_masks(folder, masks)
    plot_selection(selection, "Half-Reset", ("stay tuned", "go back")).savefig(folder / PICTURE_NAME)
