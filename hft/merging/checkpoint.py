"""Checkpoints opened, compared, and written shard by shard, so that a model is never in memory as a whole."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig

from hft.errors import HFTError, shorten
from hft.merging.operators import TensorOf
from hft.model.anatomy import anatomy_of, meta_model
from hft.model.load import check_same_ids, read_config, vocabulary
from hft.model.weights import DTYPES, SAFE_INDEX, WEIGHTS, Weights, as_bytes, downloaded
from hft.record.manifest import MANIFEST_NAME, Manifest, rounds_so_far
from hft.record.verification import verify_folder
from hft.runs.config import check_is_a_model
from hft.runs.result import CONFIG_NAME, PICTURE_NAME, RESULTS_NAME, WANDB_NAME

# Files of a model folder that belong to the run that made it, not to the model: ours and Trainer's.
RUN_FILES = (MANIFEST_NAME, RESULTS_NAME, CONFIG_NAME, PICTURE_NAME, WANDB_NAME)
RUN_FILES += ("trainer_state.json", "keep.json", "README.md")
# Tensors that older versions of transformers stored and later ones compute.
COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
# Settings under which the same weights compute something else. Sizes show in shapes.
MUST_MATCH = re.compile(
    "model_type|vocab_size|tie_word_embeddings|head_dim|num_attention_heads|num_key_value_heads|hidden_act"
    "|hidden_activation|activation_function|rope_.*|partial_rotary_factor|.*(eps|epsilon|multiplier|softcapping|scalar)"
    "|.*_scal(e|ing)|scale_.*"
)


@dataclass
class Checkpoint:
    """A model folder that has been opened: its config and headers are known, its values are still on disk."""

    name: str  # the path or Hub id it was asked for by
    folder: Path
    config: PretrainedConfig
    weights: Weights
    # Shape and dtype of each stored tensor, on `meta`: the model's parameters in model order, then what else is stored,
    # such as the `rotary_emb.inv_freq` of older Llamas; without a tied head.
    specs: dict[str, torch.Tensor]
    parameters: list[str]  # of the model, a tied head not listed twice
    tied: dict[str, str]  # the parameter that each tied parameter is tied to

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """Open a whole model, neither an adapter nor quantized, stored in the shapes that its config gives."""
        folder = downloaded(name, revision)
        check_is_a_model(str(name), folder)
        config = read_config(name, folder)
        model, weights = meta_model(config), Weights(folder)
        parameters = dict(model.named_parameters())
        stored = {name: tensor.to("meta") for name, tensor in weights.items()}
        if missing := [key for key in parameters if key not in stored]:
            if others := stored.keys() - model.state_dict().keys():
                why = f"{name} stores {min(others)}, but transformers computes with {missing[0]}"
                which = "only models that need no such conversion can be combined (not mixtures of experts, GPT-NeoX)"
                raise HFTError(f"{why}; {which}")
            raise HFTError(f"{name} lacks {shorten(missing, most=3)}, which its config has")
        for key, parameter in parameters.items():
            if (shape := stored[key].shape) != parameter.shape:
                raise HFTError(f"{key} of {name} has shape {list(shape)}, but by its config {list(parameter.shape)}")
        owners = {id(parameter): key for key, parameter in parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        tied = {key: owners[id(parameter)] for key, parameter in every if key not in parameters}
        for key, owner in tied.items():
            if key in stored and not torch.equal(as_bytes(weights[key]), as_bytes(weights[owner])):
                raise HFTError(f"{name} stores a {key} that differs from {owner}, though its config ties the two")
        names = [*parameters, *(key for key in stored if key not in parameters and key not in tied)]
        return cls(str(name), folder, config, weights, {key: stored[key] for key in names}, list(parameters), tied)

    def fp32(self, name: str) -> torch.Tensor:
        """A tensor in fp32, or in fp64 where that is stored, to compute with."""
        tensor = self.weights[name]
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def open_base(tuned: str, given: str | None, named: str | None, revision: str | None) -> Checkpoint:
    """What an adapter or a run was trained on: the model that is given, or that it names itself."""
    if given:
        return Checkpoint.open(given)
    if not named:
        raise HFTError(f"{tuned} does not say what it was trained on; name its base with --base")
    try:
        return Checkpoint.open(named, revision)
    except HFTError as error:
        raise HFTError(f"the base of {tuned} cannot be read: {error}; name it with --base") from error


def rounds_between(start: Checkpoint, model: Checkpoint) -> list[dict]:
    """The rounds of a model by its manifest, without those that its start has been through."""
    rounds, before = rounds_so_far(model.folder), rounds_so_far(start.folder)
    return rounds[len(before) :] if rounds[: len(before)] == before else rounds


def why_not_base(tuned: Checkpoint, base: Checkpoint) -> str | None:
    """A sentence if a run's manifest proves that a model was not tuned from a base: what no round trained differs."""
    if not (rounds := rounds_between(base, tuned)):
        return None
    anatomy, manifest = anatomy_of(meta_model(base.config)), Manifest.load(tuned.folder)
    untouched = set.intersection(*(set(one["frozen_units"]) for one in rounds))
    for name in manifest.frozen_checksums.keys() - manifest.masks.keys():
        units = {unit.name for unit, _ in anatomy.parts_by_parameter.get(name, ())}
        frozen = units <= untouched if units else len(rounds) == 1
        if frozen and not torch.equal(tuned.fp32(name), base.fp32(name)):
            return f"{base.name} is not the base of {tuned.name}: {name}, which was frozen, differs"
    return None


def check_verified(run: str, folder: Path, base: str | None) -> None:
    """Refuse a base, by default the one that a run's manifest names, that the manifest was not written for."""
    if not (found := verify_folder(folder, base)).ok:
        wrong = [*found.broken, *found.lost, *found.unlisted][0]
        name = base or found.against
        raise HFTError(f"{name} is not the base of {run}, or one of the two is damaged: {wrong} differs")


def arithmetic_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of `MUST_MATCH`, without rope's older `type`, which transformers repeats as `rope_type`."""

    def known(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: known(inner) for name, inner in value.items() if inner is not None and name != "type"}

    settings = known(config.get_text_config().to_dict())
    return {key: value for key, value in settings.items() if MUST_MATCH.fullmatch(key)}


def check_alike(first: Checkpoint, *others: Checkpoint) -> None:
    """Refuse models that cannot be combined tensor by tensor: one folder given twice, or models that differ in a
    setting of `MUST_MATCH`, in names, in shapes, or in what a token id means.
    """
    for a, b in combinations([first, *others], 2):
        if a.folder.resolve() == b.folder.resolve():
            raise HFTError(f"{a.name} and {b.name} are the same model; give two different ones")
    settings, tokens = arithmetic_settings(first.config), vocabulary(first.folder)
    for other in others:
        both = f"{first.name} and {other.name} do not fit together:"
        theirs = arithmetic_settings(other.config)
        for key in sorted(settings.keys() & theirs.keys(), key=lambda key: (key != "model_type", key)):
            if settings[key] != theirs[key]:
                raise HFTError(f"{both} {key} is {settings[key]} in the first and {theirs[key]} in the second")
        for which, (one, two) in {"first": (first, other), "second": (other, first)}.items():
            if names := sorted(key for key in one.specs.keys() - two.specs.keys() if not key.endswith(COMPUTED)):
                raise HFTError(f"{both} only the {which} has {shorten(names, most=3)}")
        for key in first.parameters:
            a, b = first.specs[key].shape, other.specs[key].shape
            if a != b:
                raise HFTError(f"{both} {key} has shape {list(a)} in the first and {list(b)} in the second")
        check_same_ids(tokens, vocabulary(other.folder), (first.name, other.name))


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write into or around an input, into the current folder, or into one that is not empty."""
    if out.resolve() == Path.cwd():
        raise HFTError(f"out {out} is the current folder; name another, which will be made")
    for folder in inputs:
        ours, theirs = out.resolve(), folder.resolve()
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise HFTError(f"out {out} is, holds or lies in the input {folder}; choose another folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HFTError(f"out {out} exists and is not an empty folder; choose another, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out`, or what that links to, whole or not at all.

    Until then it is `.NAME.partial` beside it; what a killed process leaves of that, the next one replaces.
    """
    target = out.resolve()
    partial, lock = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.lock"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                partial.replace(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise HFTError(f"another process is writing {out}; choose another folder, or wait for it") from error


def write_model(
    folder: Path,
    like: Checkpoint,
    tensor_of: TensorOf,
    *,
    specs: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> str:
    """Write a model in safetensors, a shard at a time, and say how much it was and how long it took.

    `like` gives names, shapes, tensors that are no parameters, other files, and dtypes, unless `specs` do.
    """
    start, specs, parameters = time.monotonic(), specs or like.specs, set(like.parameters)
    if wrong := [name for name in like.parameters if specs[name].dtype not in DTYPES]:
        raise HFTError(f"{wrong[0]} is stored in {specs[wrong[0]].dtype}, which cannot be merged")
    size, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(folder).free
    if free < size:
        raise HFTError(f"{folder.parent} has {free / 1e9:.1f} GB free and the model takes {size / 1e9:.1f} GB")
    try:
        split = split_torch_state_dict_into_shards(specs, max_shard_size=max_shard_size)
    except ValueError as error:
        raise HFTError(f"max_shard_size must be a number and a unit, such as 5GB, got {max_shard_size!r}") from error
    copy_companions(like.folder, folder)
    with tqdm(total=len(specs), desc="merging", unit="tensor", leave=False) as bar:

        def stored(name: str) -> torch.Tensor:
            bar.update()
            tensor = (tensor_of(name) if name in parameters else like.weights[name]).to(specs[name].dtype)
            if not tensor.isfinite().all():
                raise HFTError(f"{name} would hold NaN or infinity: one model does, or it overflows {tensor.dtype}")
            return tensor.contiguous()

        for filename, names in split.filename_to_tensors.items():
            save_file({name: stored(name) for name in names}, folder / filename, {"format": "pt"})
            (folder / filename).chmod((folder / "config.json").stat().st_mode)  # else only for its owner to read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return f"wrote {tqdm.format_sizeof(size, 'B')} in {time.monotonic() - start:.1f} s"


def copy_companions(source: Path, target: Path, but: Sequence[str] = ()) -> None:
    """Copy what a model folder holds beside its weights, but not the files of the run that made it."""
    for path in source.iterdir():
        of_run = path.name in (*RUN_FILES, "adapter_config.json", *but) or path.name.startswith(".")
        is_weights = any(fnmatch(path.name, pattern) for pattern in WEIGHTS)
        if path.is_file() and not (of_run or is_weights):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
