"""`hft reset` and `hft merge`: models made out of models, without training."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hft.config import Parser, fill, resolve, to_yaml
from hft.errors import HFTError
from hft.machine import indented, say
from hft.merging.checkpoint import (
    PIECE,
    TOKENIZER,
    Checkpoint,
    check_alike,
    check_out,
    copy_companions,
    new_folder,
    together,
    write_model,
)
from hft.merging.operators import LINE, Trim, drop, elect, slerp_factors, weighted_sum
from hft.model.anatomy import anatomy_of, meta_model
from hft.model.weights import checksum, local_folder, widest
from hft.record.manifest import Manifest, rounds_so_far
from hft.runs.folder import CONFIG_NAME, PICTURE_NAME, check_base, verify_folder
from hft.selection import Selection, SelectionConfig, select
from hft.selection.masks import save_masks
from hft.selection.picture import draw_selection

Pieces = Callable[[str], Iterator[torch.Tensor]]


@dataclass
class ResetConfig:
    """What `hft reset` works on; the selection's keys are `SelectionConfig`'s."""

    tuned: str | None = field(default=None, metadata={"help": "The fine-tuned model: a folder or a Hub id."})
    base: str | None = field(default=None, metadata={"help": "The model that it was tuned from."})
    out: str | None = field(default=None, metadata={"help": "Folder for the result."})
    seed: int | None = field(default=None, metadata={"help": "Short for selection_seed."})
    method: str | None = field(default=None, metadata={"help": "Of no effect, so that a method's file can be given."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest size of a file."})


@dataclass
class MergeConfig:
    """How `hft merge` merges what."""

    method: Literal["average", "ties", "dare", "dare-ties", "slerp", "wise-ft", "adapter"] | None = field(
        default=None,
        metadata={
            "help": "average: the mean of the weights; ties: the largest deltas, by the sign that wins; dare: random "
            "deltas, rescaled; dare-ties: those, by the sign that wins; slerp: on the arc between two models; wise-ft: "
            "on the line from base to model; adapter: an adapter of PEFT's added to its base."
        },
    )
    models: list[str] | None = field(default=None, metadata={"help": "Models to merge: folders or Hub ids."})
    base: str | None = field(default=None, metadata={"help": "The model that they were all tuned from."})
    out: str | None = field(default=None, metadata={"help": "Folder for the result."})
    weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "A weight a model, by default equal ones that sum to 1; average divides them by their sum, dare "
            "takes them as they are."
        },
    )
    density: float = field(default=0.2, metadata={"help": "Share of each model's deltas to keep (ties)."})
    trim: Literal["tensor", "global"] = field(
        default="tensor", metadata={"help": "Take that share of each tensor, or of the whole model (ties)."}
    )
    drop: float = field(default=0.9, metadata={"help": "Probability to drop a delta (dare, dare-ties)."})
    seed: int = field(default=0, metadata={"help": "Seed of what is dropped (dare, dare-ties)."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the merged deltas: TIES' lambda."})
    t: float = field(default=0.5, metadata={"help": "From the first model, 0, to the second, 1 (slerp)."})
    alpha: float = field(default=0.5, metadata={"help": "From the base, 0, to the model, 1 (wise-ft)."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest size of a file."})

    def __post_init__(self):
        for name in ("density", "drop", "t", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise HFTError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.drop == 1:
            raise HFTError("drop must be less than 1: with everything dropped there is nothing left to rescale")


@dataclass(frozen=True)
class Method:
    """What a method takes.

    Attributes:
        models: fewest and most models.
        base: whether it needs a base; None where one may be given, which average and slerp make no use of.
        keys: which of `MergeConfig`'s settings it has.
    """

    models: tuple[int, int | None]
    base: Literal[True] | None
    keys: tuple[str, ...]


METHODS = {
    "average": Method((2, None), None, ("weights",)),
    "ties": Method((1, None), True, ("density", "trim", "scale")),
    "dare": Method((1, None), True, ("drop", "seed", "weights", "scale")),
    "dare-ties": Method((1, None), True, ("drop", "seed", "scale")),
    "slerp": Method((2, 2), None, ("t",)),
    "wise-ft": Method((1, 1), True, ("alpha",)),
    "adapter": Method((1, 1), None, ()),
}


def reset(arguments: Sequence[str]) -> int:
    """Half-Reset (paper section 2, Table 9): what HFT would freeze goes back to the base, after the tuning.

    Args:
        arguments: `--tuned T --base B --out O`, the selection's keys, or `--config RECIPE.yaml`.

    Returns:
        The exit status: 0, or 1 if a reset tensor is not the base's.

    Raises:
        HFTError: the models do not fit together, the base is not what its manifest says, or the folder is not free.
    """
    given, flags, _ = resolve(Parser(ResetConfig, SelectionConfig), arguments)
    given = with_round(with_seed(given, flags))
    config = fill(ResetConfig, given)
    if given.get("policy") == "importance":
        raise HFTError("a reset draws units, and the importance policy needs a training run; choose another policy")
    if not (config.tuned and config.base and config.out):
        raise HFTError("tuned, base and out are needed: give --tuned T --base B --out O, or a recipe with --config")
    out, tuned, base = Path(config.out), Checkpoint.open(config.tuned), Checkpoint.open(config.base)
    check_out(out, [tuned, base])
    check_alike(tuned, base)
    check_base(config.base)

    selection = select(anatomy_of(meta_model(base.config)), fill(SelectionConfig, given))
    frozen, masks = selection.frozen_parameters, selection.frozen_masks
    if not frozen and not masks:
        raise HFTError(f"the {selection.config.policy} policy freezes nothing here, so nothing would be reset")
    say(f"resetting what would be frozen under this selection to {base.name}", indented(in_words(selection)))
    if recast := [name for name in frozen if base.specs[name].dtype != tuned.specs[name].dtype]:
        a, b = base.specs[recast[0]].dtype, tuned.specs[recast[0]].dtype
        say(f"NOTE: reset tensors stay in the base's {a}, the others in {b}; load in a dtype that holds both")

    if recast := [name for name in masks if base.specs[name].dtype != tuned.specs[name].dtype]:
        raise HFTError(f"part of {recast[0]} would be reset, but the two are stored in different dtypes; save one anew")

    differs = False

    def pieces(name: str) -> Iterator[torch.Tensor]:
        nonlocal differs
        if name not in masks and (differs or name not in frozen):
            yield from source[name].pieces(name)
            return
        mask = masks[name].tensor() if name in masks else torch.ones((), dtype=torch.bool)
        frozen_here = mask.expand(tuned.specs[name].shape).reshape(-1).split(PIECE)
        for here, ours, theirs in zip(frozen_here, tuned.pieces(name), base.pieces(name), strict=True):
            differs = differs or bool((here & (ours != theirs)).any())
            yield torch.where(here, theirs, ours.to(theirs.dtype))

    source = dict.fromkeys(tuned.specs, tuned) | dict.fromkeys(frozen, base)
    specs = {name: checkpoint.specs[name] for name, checkpoint in source.items()}
    with new_folder(out) as folder:
        start = time.monotonic()
        written = write_model(folder, tuned, pieces, specs=specs, max_shard_size=config.max_shard_size)
        if not differs:
            raise HFTError(f"{tuned.name} already has the base's values there: nothing would be reset")
        say(speed([tuned, base], written, time.monotonic() - start))
        checksums = {name: checksum(base.weights[name]) for name in frozen}
        for name, mask in masks.items():
            checksums[name] = checksum(base.weights[name][mask.tensor().expand(base.specs[name].shape)])
        Manifest.of(selection, config.base, checksums, tuned=config.tuned).save(folder)
        save_masks(folder, masks)
        draw_selection(selection, "Half-Reset", ("stay tuned", "go back")).savefig(folder / PICTURE_NAME)
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    found = verify_folder(out)
    say("verify", indented(found.report()), "", str(out))
    return 0 if found.ok else 1


def in_words(selection: Selection) -> str:
    """What a reset does by a selection: for each block how many units stay, and the shares."""
    config = selection.config
    counts = ", ".join(f"{block} {kept}/{total}" for block, (kept, total) in selection.counts().items())
    ends = "go back" if config.freeze_embeddings else "stay tuned"
    parts = f"of {len(selection.frozen_masks)} tensors a part goes back\n" if selection.frozen_masks else ""
    return (
        f"{config.policy} policy, seed {config.selection_seed}, round {config.round}: {counts} units stay tuned, the "
        f"others go back; embeddings and head {ends}\n{parts}{selection.fraction_of_layers:.1%} of the layers and "
        f"{selection.fraction_of_model:.1%} of the whole model stay tuned"
    )


def with_seed(given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The keys given, with `seed` under its long name; a flag wins over the files, whichever name each uses."""
    if "seed" in flags and flags.get("selection_seed", flags["seed"]) != flags["seed"]:
        raise HFTError("seed is short for selection_seed, and here they differ; give one of them")
    seeds = [layer[key] for layer in (flags, given) for key in reversed(layer) if key in ("seed", "selection_seed")]
    rest = {key: value for key, value in given.items() if key not in ("seed", "selection_seed")}
    return rest | ({"selection_seed": seeds[0]} if seeds else {})


def with_round(given: dict[str, Any]) -> dict[str, Any]:
    """The keys given, and the round that follows the base's."""
    rounds = rounds_so_far(given.get("base") or "")
    return ({"round": rounds[-1]["selection"]["round"] + 1} if rounds else {}) | given


def merge(arguments: Sequence[str]) -> int:
    """Merge models (paper section 4.4, Table 5).

    Args:
        arguments: `--method M --models M1 [M2 ...] [--base B] --out O`, settings, or `--config RECIPE.yaml`.

    Returns:
        The exit status, 0.

    Raises:
        HFTError: the method takes other arguments, the models do not fit together, or the folder is not free.
    """
    given, _, _ = resolve(Parser(MergeConfig), arguments)
    config = fill(MergeConfig, given)
    check_method(config, given)
    if config.method == "adapter":
        return merge_adapter(config, given)
    out, models = Path(config.out), [Checkpoint.open(name) for name in config.models]
    base = Checkpoint.open(config.base) if METHODS[config.method].base else None
    inputs = [*models, *([base] if base else [])]
    check_out(out, inputs)
    check_alike(*inputs)

    branches: Counter[str] = Counter()
    start = time.monotonic()
    with new_folder(out) as folder:
        merged = interpolated(config, models, branches) if base is None else with_deltas(config, models, base)
        written = write_model(folder, models[0], merged, max_shard_size=config.max_shard_size)
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    if branches:
        say(f"slerp: {branches['arc']} tensors along the arc, {branches['line']} along the line (|cos| > {LINE})")
    say(speed(inputs, written, time.monotonic() - start), "", str(out))
    return 0


def check_method(config: MergeConfig, given: dict[str, Any]) -> None:
    """Refuse what a method does not take.

    Raises:
        HFTError: a missing argument, a wrong number of models or weights, or a setting of another method.
    """
    if not (config.method and config.models and config.out):
        raise HFTError("method, models and out are needed: give them as flags, or a recipe with --config")
    method, count = METHODS[config.method], len(config.models)
    fewest, most = method.models
    if count < fewest or (most and count > most):
        wanted = f"{fewest} model{'s' if fewest > 1 else ''}" + ("" if most else " or more")
        raise HFTError(f"{config.method} takes {wanted}, got {count}")
    if method.base and not config.base:
        raise HFTError(f"{config.method} needs --base, the model that they were tuned from")
    settings = {key for other in METHODS.values() for key in other.keys}
    if wrong := [key for key in given if key in settings and key not in method.keys]:
        takes = f"only {', '.join(method.keys)}" if method.keys else "no settings"
        raise HFTError(f"{wrong[0]} is no setting of {config.method}, which takes {takes}")
    if config.weights and (len(config.weights) != count or not all(map(math.isfinite, config.weights))):
        raise HFTError(f"weights must be {count} numbers, one a model, got {config.weights}")
    if config.weights and config.method == "average" and not sum(config.weights):
        raise HFTError(f"average divides weights by their sum, which must not be 0, got {config.weights}")


def interpolated(config: MergeConfig, models: Sequence[Checkpoint], branches: Counter[str]) -> Pieces:
    """The merged pieces of a parameter by name, of methods that merge the weights themselves.

    Args:
        config: its method is average or slerp.
        models: what to merge.
        branches: counts the tensors that each branch of slerp took.
    """

    def average(name: str) -> Iterator[torch.Tensor]:
        weights = config.weights or [1.0] * len(models)
        for pieces in together(models, name):
            yield weighted_sum(pieces, [weight / sum(weights) for weight in weights])

    def slerp(name: str) -> Iterator[torch.Tensor]:
        *factors, branch = slerp_factors(together(models, name), config.t)
        branches[branch] += 1
        for pieces in together(models, name):
            yield weighted_sum(pieces, factors)

    return {"average": average, "slerp": slerp}[config.method]


def with_deltas(config: MergeConfig, models: Sequence[Checkpoint], base: Checkpoint) -> Pieces:
    """The merged pieces of a parameter by name, of methods that merge what the models have beyond their base.

    DARE merges the rescaled deltas by their mean unless weights are given, as its authors do with language models. What
    it drops hangs on seed, model, name and place alone, and not on how the files are cut.
    """
    weights = [config.alpha] if config.method == "wise-ft" else config.weights or [1 / len(models)] * len(models)
    combine = elect if config.method in ("ties", "dare-ties") else lambda deltas: weighted_sum(deltas, weights)

    def trims(names: Sequence[str]) -> list[Trim]:
        return [Trim(lambda model=model: deltas_of(model, base, names), config.density) for model in models]

    @functools.cache  # when the first tensor is written, and all that is cheap has been checked
    def trims_together() -> list[Trim]:
        return trims(base.parameters)

    def trims_of(name: str) -> list[Trim] | None:
        if config.method != "ties":
            return None
        return trims_together() if config.trim == "global" else trims([name])

    def merged(name: str) -> Iterator[torch.Tensor]:
        trimmed = trims_of(name)
        for place, (start, *pieces) in enumerate(together([base, *models], name)):
            deltas = [piece - start for piece in pieces]
            if trimmed:
                deltas = [trim(delta) for trim, delta in zip(trimmed, deltas, strict=True)]
            elif config.method in ("dare", "dare-ties"):
                keys = [f"{config.seed}/{index}/{name}/{place}" for index in range(len(models))]
                deltas = [drop(delta, config.drop, key) for delta, key in zip(deltas, keys, strict=True)]
            yield start + config.scale * combine(deltas)

    return merged


def deltas_of(model: Checkpoint, base: Checkpoint, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """What a model has beyond its base in the given parameters, piece by piece."""
    for name in tqdm(names, desc="finding where to trim", unit="tensor", leave=False, disable=len(names) == 1):
        for tuned, start in together([model, base], name):
            yield tuned - start


def merge_adapter(config: MergeConfig, given: dict[str, Any]) -> int:
    """Merge an adapter that PEFT saved into its base; unlike the other methods this holds the model in memory, in fp32.

    Raises:
        HFTError: the folder holds no adapter, one that cannot be merged, or one that does not fit the base.
    """
    out, adapter, start = Path(config.out), config.models[0], time.monotonic()
    try:
        peft_config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HFTError(f"{adapter} holds no adapter that PEFT saved: {str(error).partition(chr(10))[0]}") from error
    if peft_config.is_prompt_learning:
        raise HFTError(f"{adapter} is {peft_config.peft_type.value}: learned prompts are no weights to merge")
    base = base_of(peft_config, config)
    check_out(out, [base])
    try:
        # OSF takes its factors from the weights as they are stored; the others are added more exactly in fp32.
        as_stored = peft_config.peft_type == PeftType.OSF
        dtype = widest(base.weights.dtypes().values()) if as_stored else torch.float32
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise HFTError(f"cannot merge {adapter} into {base.name}: {str(error).partition(chr(10))[0]}") from error
    state = model.state_dict()
    if any(not torch.equal(state[key], state[owner]) for key, owner in base.tied.items()):
        raise HFTError(
            f"{adapter} changes the head, which {base.name} ties to its embeddings; save the base untied first"
        )
    if wrong := [key for key in base.parameters if state[key].shape != base.specs[key].shape]:
        raise HFTError(f"{adapter} changes the shape of {wrong[0]}; only adapters that keep all shapes can be merged")

    base.bytes_read = sum(spec.nbytes for spec in base.specs.values())
    with new_folder(out) as folder:
        written = write_model(
            folder, base, lambda key: state[key].reshape(-1).split(PIECE), max_shard_size=config.max_shard_size
        )
        copy_companions(local_folder(adapter), folder, TOKENIZER)
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    say(speed([base], written, time.monotonic() - start), "", str(out))
    return 0


def base_of(adapter: PeftConfig, config: MergeConfig) -> Checkpoint:
    """The base of an adapter, by --base or by what the adapter says.

    Raises:
        HFTError: neither names a model that is there.
    """
    if config.base:
        return Checkpoint.open(config.base)
    name, hint = adapter.base_model_name_or_path, "name its base with --base"
    if not name:
        raise HFTError(f"{config.models[0]} does not say what it was trained on; {hint}")
    try:
        return Checkpoint.open(name, adapter.revision)
    except HFTError as error:
        raise HFTError(f"the base of {config.models[0]} cannot be read: {error}; {hint}") from error


def speed(inputs: Sequence[Checkpoint], written: int, seconds: float) -> str:
    """Bytes read and written, and how fast, in words."""
    read, size = sum(checkpoint.bytes_read for checkpoint in inputs), tqdm.format_sizeof
    rate = size((read + written) / seconds, "B/s")
    return f"read {size(read, 'B')}, wrote {size(written, 'B')} in {seconds:.1f} s: {rate}"
