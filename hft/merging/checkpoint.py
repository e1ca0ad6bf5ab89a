"""Checkpoints opened, compared, read and written in chunks, so that a model is never in memory as a whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from tqdm import tqdm
from transformers import PretrainedConfig

from hft.errors import HFTError, shorten
from hft.machine import in_threads
from hft.model.anatomy import meta_model
from hft.model.load import read_config
from hft.model.vocabulary import check_same_ids, vocabulary
from hft.model.weights import DTYPES, INTEGERS, SAFE_INDEX, Weights, as_bytes, is_weights, local_folder
from hft.record.manifest import MANIFEST_NAME
from hft.runs.result import CONFIG_NAME, PICTURE_NAME, RESULTS_NAME

# Elements in a chunk. This many stay in a processor's cache; four times as many take twice as long per element.
CHUNK_NUMEL = 2**18

# Files of a model folder that belong to the run that made it, not to the model: ours and Trainer's.
RUN_FILES = (MANIFEST_NAME, RESULTS_NAME, CONFIG_NAME, PICTURE_NAME, "trainer_state.json", "README.md")
# Tensors that older versions of transformers stored and later ones compute.
COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
ADAPTER_CONFIG = "adapter_config.json"
# Settings under which the same weights compute something else. Sizes show in shapes.
MUST_MATCH = re.compile(
    "model_type|vocab_size|tie_word_embeddings|head_dim|num_attention_heads|num_key_value_heads|hidden_act"
    "|hidden_activation|activation_function|rope_.*|partial_rotary_factor|.*(eps|epsilon|multiplier|softcapping|scalar)"
    "|.*_scal(e|ing)|scale_.*"
)


@dataclass
class Checkpoint:
    """A model folder that has been opened: its config and headers are known, its values are still on disk.

    Attributes:
        name: the path or Hub id it was asked for by.
        folder: where its files are.
        config: its config.
        weights: its tensors by name, read on demand.
        specs: shape and dtype of each stored tensor, on `meta`: the model's parameters in model order, then what else
            is stored, such as the `rotary_emb.inv_freq` of older Llamas. A tied head is left out.
        parameters: names of the model's parameters, a tied head not listed twice.
        tied: names of tied parameters, and the parameter that each is tied to.
        reads: bytes of each chunk that has been read so far; a list, as several threads add to it.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    weights: Weights
    specs: dict[str, torch.Tensor]
    parameters: list[str]
    tied: dict[str, str]
    reads: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """Open a folder, or a model of the Hub at some revision.

        Raises:
            HFTError: it is not a complete model: a missing config, a missing or truncated file, parameters that are
                missing or of another shape than the config has them, or a stored head that differs from the embeddings
                it is tied to; or it is an adapter or quantized.
        """
        folder = local_folder(name, revision)
        config = config_of(name, folder)
        model, weights = meta_model(config), Weights(folder)
        parameters, stored = dict(model.named_parameters()), weights.specs()
        check_stored(name, parameters, stored, set(model.state_dict()))
        owners = {id(parameter): key for key, parameter in parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        tied = {key: owners[id(parameter)] for key, parameter in every if key not in parameters}
        for key, owner in tied.items():
            if key in stored and not torch.equal(as_bytes(weights[key]), as_bytes(weights[owner])):
                raise HFTError(f"{name} stores a {key} of its own, though its config ties it to {owner}")
        names = [*parameters, *(key for key in stored if key not in parameters and key not in tied)]
        return cls(str(name), folder, config, weights, {key: stored[key] for key in names}, list(parameters), tied)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embeddings."""
        return self.config.get_text_config().vocab_size

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor as stored, flattened, `CHUNK_NUMEL` elements at a time."""
        for chunk in self.weights[name].reshape(-1).split(CHUNK_NUMEL):
            self.reads.append(chunk.nbytes)
            yield chunk

    def fp32_chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The same in fp32, or in fp64 where that is stored, to compute with."""
        for chunk in self.chunks(name):
            yield chunk.to(torch.promote_types(chunk.dtype, torch.float32))


def config_of(name: str, folder: Path) -> PretrainedConfig:
    """The config of a model folder.

    Raises:
        HFTError: it cannot be read, or it is that of an adapter or of a quantized model.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise HFTError(
            f"{name} is an adapter; `hft merge --method adapter --models {name} --out MODEL` makes a model of it"
        )
    return read_config(name, folder)


def check_stored(
    name: str, parameters: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], known: set[str]
) -> None:
    """Refuse files that do not hold a model's parameters under the names and in the shapes that its config gives.

    Args:
        name: of the model, for messages.
        parameters: by name, on `meta`.
        stored: the same of what the files hold.
        known: every name of the model's state dict.
    """
    if missing := [key for key in parameters if key not in stored]:
        if others := set(stored) - known:
            raise HFTError(
                f"{name} stores {min(others)} where transformers computes with {missing[0]}; only models stored as "
                "they are computed can be combined (not mixtures of experts, GPT-NeoX)"
            )
        raise HFTError(f"{name} lacks {shorten(missing, most=3)}, which its config has")
    if wrong := [key for key, parameter in parameters.items() if stored[key].shape != parameter.shape]:
        raise HFTError(
            f"in {name} {wrong[0]} has shape {list(stored[wrong[0]].shape)}, by its config "
            f"{list(parameters[wrong[0]].shape)}"
        )


def zip_chunks(checkpoints: Sequence[Checkpoint], name: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """The chunks of one tensor in fp32, of all checkpoints at a time."""
    return zip(*(checkpoint.fp32_chunks(name) for checkpoint in checkpoints), strict=True)


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of how weights are computed with, in one spelling: rope's `type` is its `rope_type`."""
    settings = {key: value for key, value in config.get_text_config().to_dict().items() if MUST_MATCH.fullmatch(key)}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = {name: inner for name, inner in value.items() if inner is not None}  # noqa: PLW2901
            kind = {"rope_type": value.pop("type")} if "type" in value else {}
            settings[key] = kind | value
    return settings


def check_alike(first: Checkpoint, *others: Checkpoint) -> None:
    """Refuse models that cannot be combined tensor by tensor.

    Raises:
        HFTError: two of them are one folder, or differ in a setting of `MUST_MATCH`, in names, in shapes, or in what a
            token id means.
    """
    for a, b in combinations([first, *others], 2):
        if a.folder.resolve() == b.folder.resolve():
            raise HFTError(f"{a.name} and {b.name} are the same model; give two different ones")
    settings, tokens = settings_of(first.config), vocabulary(first.folder)
    for other in others:
        both = f"{first.name} and {other.name} do not fit together:"
        theirs = settings_of(other.config)
        for key in sorted(settings.keys() & theirs.keys(), key=lambda key: (key != "model_type", key)):
            if settings[key] != theirs[key] and None not in (settings[key], theirs[key]):
                raise HFTError(f"{both} {key} is {settings[key]} in the first and {theirs[key]} in the second")
        for which, (one, two) in {"first": (first, other), "second": (other, first)}.items():
            if names := [key for key in one.specs if key not in two.specs and not key.endswith(COMPUTED)]:
                raise HFTError(f"{both} only the {which} has {shorten(names, most=3)}")
        for key in first.parameters:
            a, b = first.specs[key].shape, other.specs[key].shape
            if a != b:
                raise HFTError(f"{both} {key} has shape {list(a)} in the first and {list(b)} in the second")
        check_same_ids(tokens, vocabulary(other.folder), (first.name, other.name))


def check_out(out: Path, inputs: Sequence[Checkpoint]) -> None:
    """Refuse to write where something is already.

    Raises:
        HFTError: the folder is one of the inputs, inside one or around one, the current one, or not empty.
    """
    if out.resolve() == Path.cwd():
        raise HFTError(f"out {out} is the current folder; name another, which will be made")
    for checkpoint in inputs:
        ours, theirs = out.resolve(), checkpoint.folder.resolve()
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise HFTError(f"out {out} is, holds or lies in the input {checkpoint.name}; choose another folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HFTError(f"out {out} exists and is not an empty folder; choose another, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out` at the end, whole or not at all.

    Until then it is `.NAME.partial` beside the target, and any exception removes it. What a killed process leaves of
    it, the next one with the same target replaces. Where `out` is a link, the target is what it leads to.

    Raises:
        HFTError: another process is writing it, it cannot be written, or a file elsewhere cannot be read.
    """
    target = out.resolve()
    partial, lock = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
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
    except OSError as error:
        place = Path(error.filename).absolute() if isinstance(error.filename, str | Path) else partial
        if not (place.is_relative_to(partial) or partial.is_relative_to(place) or place == lock):
            raise HFTError(f"cannot read {error.filename}: {error.strerror or error}") from error
        raise HFTError(f"cannot write {out}: {error.strerror or error}") from error


def write_model(
    folder: Path,
    like: Checkpoint,
    chunks_of: Callable[[str], Iterable[torch.Tensor]],
    *,
    specs: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> int:
    """Write a model in safetensors, tensor by tensor, with the companion files of another one.

    Only chunks are in memory, one per thread, whatever the size of the model, of a tensor or of a shard. What is read
    is mapped into memory by file: its pages count as resident while there is room, and the kernel takes them back when
    there is none.

    Args:
        folder: an existing folder.
        like: the model whose names, shapes, dtypes, tokenizer and config are written.
        chunks_of: the flat chunks of a parameter, by its name; called in several threads. Tensors that are not
            parameters are `like`'s.
        specs: where dtypes are to be others than `like`'s.
        max_shard_size: bytes of a file, as `save_pretrained` takes it.

    Returns:
        Bytes of tensors written.

    Raises:
        HFTError: as `plan_files`, or a tensor would hold NaN or infinity.
    """
    specs, split = plan_files(folder, like, specs, max_shard_size)
    parameters, size = set(like.parameters), sum(spec.nbytes for spec in specs.values())
    copy_companions(like.folder, folder)
    with tqdm(total=size, desc="writing", unit="B", unit_scale=True, leave=False) as bar:

        def stored(name: str) -> Iterator[torch.Tensor]:
            for chunk in chunks_of(name) if name in parameters else like.chunks(name):
                yield _stored(name, chunk, specs[name].dtype)
                with bar.get_lock():
                    bar.update(chunk.numel() * specs[name].itemsize)

        for filename, names in split.filename_to_tensors.items():
            of_file = {name: specs[name] for name in names}
            write_safetensors(folder / filename, of_file, stored, {"format": "pt"}, threads=True)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    Weights(folder)  # reads the headers, which must account for every byte
    return size


def plan_files(
    folder: Path, like: Checkpoint, specs: Mapping[str, torch.Tensor] | None = None, max_shard_size: str = "5GB"
) -> tuple[dict[str, torch.Tensor], StateDictSplit]:
    """What `write_model` will write to which files; everything that can fail before it begins, fails here.

    Returns:
        Shape and dtype of each tensor in the order of writing, and the names by file.

    Raises:
        HFTError: a tensor has a dtype that cannot be written, there is too little space, or `max_shard_size` is not a
            size.
    """
    # As safetensors' own writer does, wide dtypes come first, so that every tensor is aligned.
    specs = dict(sorted((specs or like.specs).items(), key=lambda item: -item[1].itemsize))
    parameters = set(like.parameters)
    for name, spec in specs.items():
        if spec.dtype not in (DTYPES if name in parameters else DTYPES | INTEGERS).values():
            raise HFTError(f"{name} is stored in {spec.dtype}, which cannot be merged")
    size, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(folder).free
    if free < size:
        raise HFTError(f"{folder.parent} has {free / 1e9:.1f} GB free and the model takes {size / 1e9:.1f} GB")
    try:
        return specs, split_torch_state_dict_into_shards(specs, max_shard_size=max_shard_size)
    except ValueError as error:
        raise HFTError(f"max_shard_size must be a number and a unit, such as 5GB, got {max_shard_size!r}") from error


def _stored(name: str, chunk: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    stored = chunk.to(dtype)
    # The sum, which is quick, is finite only if every element is; if it is not, it may have overflowed.
    total = stored.sum(dtype=torch.promote_types(dtype, torch.float32))
    if not (total.isfinite() or stored.isfinite().all()):
        raise HFTError(
            f"{name} would hold NaN or infinity: it does in one of the models, or overflows {dtype} when they are "
            "combined"
        )
    return stored


def write_safetensors(
    path: Path,
    specs: Mapping[str, torch.Tensor],
    chunks_of: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str],
    *,
    threads: bool = False,
) -> None:
    """Write a safetensors file in chunks, so that no tensor is in memory as a whole.

    Args:
        path: the file.
        specs: shape and dtype of each tensor, by name.
        chunks_of: the flat chunks of a tensor, in its dtype, by its name.
        metadata: the file's.
        threads: whether to write several tensors at a time, large ones first; else they are written in order.
    """
    header = _header(specs, metadata)
    path.write_bytes(header)
    starts = dict(zip(specs, accumulate((spec.nbytes for spec in specs.values()), initial=len(header)), strict=False))

    def write(name: str) -> None:
        with path.open("r+b") as file:
            file.seek(starts[name])
            for chunk in chunks_of(name):
                file.write(as_bytes(chunk).numpy())
            if (written := file.tell() - starts[name]) != specs[name].nbytes:
                raise ValueError(f"{name} has {specs[name].nbytes} bytes, and {written} were written")

    names = sorted(specs, key=lambda name: -specs[name].nbytes) if threads else specs
    for _ in in_threads(write, names) if threads else map(write, names):
        pass


def _header(specs: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file: length of the header, then names, dtypes, shapes and offsets as JSON."""
    codes = {dtype: code for code, dtype in (DTYPES | INTEGERS).items()}
    content: dict[str, dict] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        content[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_companions(source: Path, target: Path, but: Sequence[str] = ()) -> None:
    """Copy what a model folder holds beside its weights: config, tokenizer, chat templates, license, code.

    Args:
        source: the model's folder.
        target: an existing folder.
        but: names of files that are left out, beside those of the run that made the model.
    """
    for path in source.iterdir():
        of_run = path.name in (*RUN_FILES, ADAPTER_CONFIG, *but) or path.name.startswith(".")
        if path.is_file() and not is_weights(path) and not of_run:
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def throughput(inputs: Sequence[Checkpoint], written: int, seconds: float) -> str:
    """Bytes read and written, and how fast, in words."""
    read, size = sum(sum(checkpoint.reads) for checkpoint in inputs), tqdm.format_sizeof
    rate = size((read + written) / seconds, "B/s")
    return f"read {size(read, 'B')}, wrote {size(written, 'B')} in {seconds:.1f} s: {rate}"
