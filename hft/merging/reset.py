"""`hft reset`: Half-Reset (paper section 2, Table 9), in which half of a tuned model goes back to its base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hft.config import Keys, fill, option, read_arguments, to_yaml
from hft.errors import HFTError
from hft.machine import indented, say
from hft.merging.checkpoint import Checkpoint, check_alike, check_out, new_folder, why_not_base, write_model
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
    seed: int | None = option("Short for selection_seed.")
    method: str | None = option("Has no effect, so that a method's file can be given.")
    max_shard_size: str = option("Largest size of a file.", "5GB")


def main(arguments: Sequence[str]) -> int:
    """Reset what HFT would freeze to the base, after the tuning; 1 if a reset tensor is not the base's."""
    groups = {"reset": (ResetConfig,), "selection": (SelectionConfig,)}
    arguments = read_arguments(arguments, "hft reset", "Reset half of a tuned model to its base.", groups)
    if len({str(arguments.flags[key]) for key in ("seed", "selection_seed") if key in arguments.flags}) > 1:
        raise HFTError("seed is short for selection_seed, and here they differ; give one of them")
    given, flags = arguments.resolve(Keys((ResetConfig, SelectionConfig)))
    if (seed := given.pop("seed", None)) is not None and "selection_seed" not in flags:
        given["selection_seed"] = seed
    if rounds := rounds_so_far(given.get("base") or ""):
        given = {"round": rounds[-1]["selection"]["round"] + 1} | given
    config = fill(ResetConfig, given)
    if not (config.tuned and config.base and config.out):
        raise HFTError("tuned, base and out are needed: give --tuned T --base B --out O, or a recipe with --config")
    out, tuned, base = Path(config.out), Checkpoint.open(config.tuned), Checkpoint.open(config.base)
    check_out(out, [tuned, base])
    check_alike(tuned, base)
    check_base(config.base)
    if sentence := why_not_base(tuned, base):
        raise HFTError(sentence)
    chosen = fill(SelectionConfig, given)
    check_scored_base(chosen, config.base)
    selection = select(anatomy_of(meta_model(base.config)), chosen)
    say(f"resetting what would be frozen under this selection to {base.name}", indented(describe_reset(selection)))
    say(*check_reset(selection, tuned, base))
    with new_folder(out) as folder:
        say(write_reset(folder, selection, tuned, base, config.max_shard_size))
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    found = verify_folder(out)
    settings = {key: value for key, value in given.items() if key != "out"}
    write_card(out, Manifest.load(out), settings, ("hft", "half-reset"), verified=found.counts())
    say("verify", indented(found.report()), "", str(out))
    return 0 if found.ok else 1


def check_reset(selection: Selection, tuned: Checkpoint, base: Checkpoint) -> list[str]:
    """Refuse a reset that cannot be written or would change nothing; returns notes on dtypes."""
    frozen, masks, notes = selection.frozen_parameters, selection.frozen_masks, []
    if not frozen and not masks:
        raise HFTError(f"the {selection.config.policy} policy freezes nothing here, so nothing would be reset")
    recast = [name for name in (*frozen, *masks) if base.specs[name].dtype != tuned.specs[name].dtype]
    if parts := [name for name in recast if name in masks]:
        raise HFTError(f"part of {parts[0]} would be reset, but the two are stored in different dtypes; convert one")
    if recast:
        a, b = base.specs[recast[0]].dtype, tuned.specs[recast[0]].dtype
        notes = [f"NOTE: reset tensors stay in the base's {a}, the others in {b}; load in a dtype that holds both"]
    reset = resetter(selection, tuned, base)
    if all(bool((reset(name) == tuned.weights[name]).all()) for name in (*frozen, *masks)):
        raise HFTError(f"{tuned.name} already has the base's values there: nothing would be reset")
    return notes


def resetter(selection: Selection, tuned: Checkpoint, base: Checkpoint) -> Callable[[str], torch.Tensor]:
    """A parameter after the reset, by its name."""
    frozen, masks = set(selection.frozen_parameters), selection.frozen_masks

    def reset(name: str) -> torch.Tensor:
        if name in masks:
            return torch.where(masks[name].tensor(), base.weights[name], tuned.weights[name])
        return (base if name in frozen else tuned).weights[name]

    return reset


def write_reset(folder: Path, selection: Selection, tuned: Checkpoint, base: Checkpoint, max_shard_size: str) -> str:
    from hft.record.picture import plot_selection

    frozen, masks = selection.frozen_parameters, selection.frozen_masks
    specs = tuned.specs | {name: base.specs[name] for name in frozen}
    reset = resetter(selection, tuned, base)
    done = write_model(folder, tuned, reset, specs=specs, max_shard_size=max_shard_size)
    values = {name: frozen_values(base.weights[name], masks.get(name)) for name in (*frozen, *masks)}
    checksums = {name: checksum(value) for name, value in values.items()}
    Manifest.of(selection, base.name, checksums, tuned=tuned.name).save(folder)
    save_masks(folder, masks)
    plot_selection(selection, "Half-Reset", ("stay tuned", "go back")).savefig(folder / PICTURE_NAME)
    return done


def describe_reset(selection: Selection) -> str:
    config = selection.config
    counts = ", ".join(f"{block} {kept}/{total}" for block, (kept, total) in selection.counts().items())
    ends = "go back" if config.freeze_embeddings else "stay tuned"
    parts = f"of {len(selection.frozen_masks)} tensors a part goes back\n" if selection.frozen_masks else ""
    return (
        f"{config.policy} policy, seed {config.selection_seed}, round {config.round}: {counts} units stay tuned, the "
        f"others go back; embeddings and head {ends}\n{parts}{selection.fraction_of_layers:.1%} of the layers and "
        f"{selection.fraction_of_model:.1%} of the whole model stay tuned"
    )
