"""Checkpoints opened, compared, read and written a piece at a time, so that a model is never in memory as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hft.errors import HFTError
from hft.model.anatomy import meta_model, shorten
from hft.model.weights import DTYPES, INTEGERS, Weights, as_bytes, local_folder

# Scalars in a piece. DARE draws one mask a piece, so that another length makes another (equally valid) merge.
# This many stay in a processor's cache; four times as many take twice as long a scalar.
PIECE = 2**18

# What a model folder holds beside its weights that belongs to the model and not to the run that made it.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja")
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER, "LICENSE*", "USE_POLICY*")

# Where two configs must be the same, since the weights mean something else under another value. Sizes show in shapes.
SAME = ("model_type", "vocab_size", "tie_word_embeddings", "head_dim", "num_attention_heads", "num_key_value_heads")
SAME += ("rope_parameters", "hidden_act", "hidden_activation", "activation_function")


@dataclass
class Checkpoint:
    """A model folder that has been opened: its config and headers are known, its values are still on disk.

    Attributes:
        name: the path or Hub id it was asked for by.
        folder: where its files are.
        config: its config.
        weights: its tensors by name, read when asked for.
        specs: shape and dtype of each stored tensor, on `meta`: the model's parameters in model order, then what else
            is stored, such as the `rotary_emb.inv_freq` of older Llamas. A tied head is left out.
        parameters: names of the model's parameters, a tied head not listed twice.
        tied: names of tied parameters, and the parameter that each is tied to.
        bytes_read: how much of it has been read so far.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    weights: Weights
    specs: dict[str, torch.Tensor]
    parameters: list[str]
    tied: dict[str, str]
    bytes_read: int = 0

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """Open a folder, or a model of the Hub at some revision.

        Raises:
            HFTError: it is no whole model: no config, a missing or truncated file, parameters that are missing or of
                another shape than the config has them, or a stored head that is not the embeddings it is tied to; or it
                is an adapter.
        """
        folder = local_folder(name, revision)
        if (folder / ADAPTER_CONFIG_NAME).exists():
            raise HFTError(
                f"{name} is an adapter; `hft merge --method adapter --models {name} --out MODEL` makes a model of it"
            )
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise HFTError(f"cannot read the config of {name}: {reason}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise HFTError(f"{name} is quantized; give the original model")
        model, weights = meta_model(config), Weights(folder)
        parameters = dict(model.named_parameters())
        stored = weights.specs()
        if missing := [key for key in parameters if key not in stored]:
            if others := set(stored) - model.state_dict().keys():
                raise HFTError(
                    f"{name} stores {min(others)} where transformers computes with {missing[0]}; only models stored as "
                    "they are computed can be combined (not mixtures of experts, GPT-NeoX)"
                )
            raise HFTError(f"{name} lacks {shorten(missing, most=3)}, which its config has")
        if wrong := [key for key, p in parameters.items() if stored[key].shape != p.shape]:
            raise HFTError(
                f"in {name} {wrong[0]} has shape {list(stored[wrong[0]].shape)}, by its config "
                f"{list(parameters[wrong[0]].shape)}"
            )
        owners = {id(parameter): key for key, parameter in parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        tied = {key: owners[id(parameter)] for key, parameter in every if key not in parameters}
        for key, owner in tied.items():
            if key in stored and not torch.equal(as_bytes(weights[key]), as_bytes(weights[owner])):
                raise HFTError(f"{name} stores a {key} of its own, though its config ties it to {owner}")
        names = [*parameters, *(key for key in stored if key not in parameters and key not in tied)]
        return cls(str(name), folder, config, weights, {key: stored[key] for key in names}, list(parameters), tied)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor as stored, flattened, `PIECE` scalars at a time."""
        for piece in self.weights[name].reshape(-1).split(PIECE):
            self.bytes_read += piece.nbytes
            yield piece

    def wide_pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same in fp32, or in fp64 where that is stored, to compute with."""
        for piece in self.pieces(name):
            yield piece.to(torch.promote_types(piece.dtype, torch.float32))


def together(checkpoints: Sequence[Checkpoint], name: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """The pieces of one tensor, of all checkpoints at a time."""
    return zip(*(checkpoint.wide_pieces(name) for checkpoint in checkpoints), strict=True)


def check_alike(first: Checkpoint, *others: Checkpoint) -> None:
    """Refuse models that cannot be combined tensor by tensor.

    Raises:
        HFTError: two of them are one folder, or differ in a setting of `SAME`, in names or in shapes.
    """
    for a, b in combinations([first, *others], 2):
        if a.folder.resolve() == b.folder.resolve():
            raise HFTError(f"{a.name} and {b.name} are the same model; give two different ones")
    for other in others:
        both = f"{first.name} and {other.name} do not fit together:"
        ours, theirs = first.config.get_text_config(), other.config.get_text_config()
        for key in SAME:
            a, b = getattr(ours, key, None), getattr(theirs, key, None)
            if a != b and None not in (a, b):
                raise HFTError(f"{both} {key} is {a} in the one and {b} in the other")
        if different := [key for key in first.parameters if key not in other.parameters]:
            raise HFTError(f"{both} only the one has {shorten(different, most=3)}")
        if different := [key for key in other.parameters if key not in first.parameters]:
            raise HFTError(f"{both} only the other has {shorten(different, most=3)}")
        for key in first.parameters:
            a, b = first.specs[key].shape, other.specs[key].shape
            if a != b:
                raise HFTError(f"{both} {key} has shape {list(a)} in the one and {list(b)} in the other")


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
    it, the next one with the same target replaces. Where `out` is a link, that is what it leads to.

    Raises:
        HFTError: it cannot be written, for want of space or of permission, or a file elsewhere cannot be read.
    """
    target = out.resolve()
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        place = Path(error.filename).absolute() if isinstance(error.filename, str | Path) else partial
        if not (place.is_relative_to(partial) or partial.is_relative_to(place)):
            raise HFTError(f"cannot read {error.filename}: {error.strerror or error}") from error
        raise HFTError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    folder: Path,
    like: Checkpoint,
    pieces_of: Callable[[str], Iterable[torch.Tensor]],
    *,
    specs: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> int:
    """Write a model in safetensors, tensor by tensor, with the companion files of another one.

    Files are written as they come, header first, so that only pieces are in memory, whatever the size of the model,
    of a tensor or of a shard. What is read is mapped into memory by file: its pages count as resident while there is
    room, and the kernel takes them back when there is none.

    Args:
        folder: an existing folder.
        like: the model whose names, shapes, dtypes, tokenizer and config are written.
        pieces_of: the flat pieces of a parameter, by its name. Tensors that are no parameters are `like`'s.
        specs: where dtypes are to be others than `like`'s.
        max_shard_size: bytes of a file, as `save_pretrained` takes it.

    Returns:
        Bytes of tensors written.

    Raises:
        HFTError: a tensor would hold NaN or infinity, there is too little space, or the size of a file is none.
    """
    specs, parameters = dict(specs or like.specs), set(like.parameters)
    for name, spec in specs.items():
        if spec.dtype not in (DTYPES if name in parameters else DTYPES | INTEGERS).values():
            raise HFTError(f"{name} is stored in {spec.dtype}, which cannot be merged")
    # As safetensors' own writer does, wide dtypes come first, so that every tensor is aligned.
    specs = dict(sorted(specs.items(), key=lambda item: -item[1].itemsize))
    size = sum(spec.nbytes for spec in specs.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise HFTError(f"{folder.parent} has {free / 1e9:.1f} GB free and the model takes {size / 1e9:.1f} GB")
    try:
        split = split_torch_state_dict_into_shards(specs, max_shard_size=max_shard_size)
    except ValueError as error:
        raise HFTError(f"max_shard_size must be a number and a unit, such as 5GB, got {max_shard_size!r}") from error
    copy_companions(like.folder, folder)
    with tqdm(total=size, desc="writing", unit="B", unit_scale=True, leave=False) as bar:
        for filename, names in split.filename_to_tensors.items():
            with (folder / filename).open("wb") as file:
                file.write(_header({name: specs[name] for name in names}))
                for name in names:
                    for piece in pieces_of(name) if name in parameters else like.pieces(name):
                        stored = piece.to(specs[name].dtype)
                        if not _finite(stored):
                            raise HFTError(
                                f"{name} would hold NaN or infinity: it does in one of the models, or overflows "
                                f"{stored.dtype} when they are combined"
                            )
                        bar.update(file.write(as_bytes(stored).numpy()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    Weights(folder)  # reads the headers, which must account for every byte
    return size


def _finite(piece: torch.Tensor) -> bool:
    # The sum, which is quick, is finite only if every scalar is; if it is not, it may have overflowed.
    total = piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32))
    return bool(total.isfinite() or piece.isfinite().all())


def _header(specs: Mapping[str, torch.Tensor]) -> bytes:
    """The start of a safetensors file: length of the header, then names, dtypes, shapes and offsets as JSON."""
    codes = {dtype: code for code, dtype in (DTYPES | INTEGERS).items()}
    content: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        content[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_companions(source: Path, target: Path, patterns: Sequence[str] = COMPANIONS) -> None:
    """Copy config, tokenizer, chat template and license of a model folder into another, or what else is named."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
