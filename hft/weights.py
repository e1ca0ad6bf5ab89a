"""The tensors of a checkpoint folder, read one at a time and never all at once."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hft.errors import HFTError

# safetensors' names of the dtypes that a model's weights come in.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Mapping):
    """Tensor names of a safetensors checkpoint, each read from disk when it is asked for.

    Raises:
        HFTError: the folder holds no safetensors weights, or a file is missing or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = {}
        for path in weight_files(self.folder):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, FileNotFoundError) as error:
                raise HFTError(f"{path} is not a whole safetensors file ({error}); fetch or save it again") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor on disk, from the headers."""
        return {name: DTYPES[file.get_slice(name).get_dtype()] for name, file in self._files.items()}

    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every tensor exactly; mostly all have the same one."""
        return functools.reduce(torch.promote_types, self.dtypes().values())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or those its index names."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / SAFE_WEIGHTS_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    raise HFTError(
        f"{folder} holds no safetensors weights; if it holds .bin files, load it with transformers and save_pretrained"
    )


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: the path itself, or where the Hub's files lie once they are downloaded.

    Raises:
        HFTError: the model is neither a folder nor reachable on the Hub.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise HFTError(f"{model} is neither a folder nor to be had from the Hub: {reason}") from error


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(as_bytes(tensor).numpy())
    return digest.hexdigest()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, to compare bit by bit: unlike `==` it tells -0.0 from 0.0 and finds NaN equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def cast_weights(folder: str | Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Rewrite the safetensors files of a folder so that each tensor has the dtype given for its name.

    A file is replaced in one step: a reader sees the old or the new one, never half of it.
    """
    for path in tqdm(weight_files(Path(folder)), desc="casting the saved weights", leave=False):
        tensors = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in load_file(path).items()}
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
