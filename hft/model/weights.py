"""The tensors of a checkpoint folder, mapped into memory and read when they are used."""

import functools
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hft.errors import HFTError, neighbor, reason
from hft.model.anatomy import architecture_of, meta_model

# As transformers names them; importing its constants would take seconds.
SAFE_FILE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# The files of weights, in whatever format, and of states to resume from.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.npz")
# The config in a folder that holds some of a model's tensors only. Without a config.json nothing takes it for a model.
MODEL_CONFIG = "hft_model_config.json"

# The dtypes that a model's weights come in; others are read to be known.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# How names start that can only be meant as folders.
LOCAL_PREFIXES = ("./", "../", "~", "runs/", "models/")
MADE = ("smollm2-135m", "tiny")  # in models/, by `hft fetch`


class Weights(dict[str, torch.Tensor]):
    """The tensors of a checkpoint folder by name, from safetensors or .bin files."""

    def __init__(self, folder: str | Path):
        super().__init__()
        for path in weight_files(Path(folder)):
            try:
                if path.suffix == ".safetensors":
                    self |= load_file(path)
                else:
                    mmap = zipfile.is_zipfile(path)  # the format of torch before 1.6 can only be read whole
                    content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
                    self |= {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
            except (SafetensorError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
                raise HFTError(f"{path} is incomplete ({reason(error)}); fetch or save it again") from error

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.items()}


def weights_of(folder: str | Path, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint folder under the names that the model has for them, in the dtypes they are stored in.

    transformers loads, whole, what is stored in another form than it is computed in, such as one expert at a time.
    """
    stored = Weights(folder)
    if all(name in stored for name in names):
        return stored
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    model = meta_model(config)
    if set(stored) <= model.state_dict().keys():
        return stored  # the same form, with tensors missing
    dtypes = dtypes_of(model, stored)
    wide = widest(dtypes[name] for name, _ in model.named_parameters())
    model, info = architecture_of(config).from_pretrained(folder, dtype=wide, output_loading_info=True)
    missing = info["missing_keys"]
    return {name: p.detach().to(dtypes[name]) for name, p in model.named_parameters() if name not in missing}


def dtypes_of(model: torch.nn.Module, stored: Weights) -> dict[str, torch.dtype]:
    """The dtype on disk of each parameter and stored buffer of a model, which may be on `meta`.

    What is not on disk, such as a new head, gets a dtype that holds whatever the model has no name for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    on_disk, held = stored.dtypes(), model.state_dict()
    if bad := [name for name, dtype in on_disk.items() if dtype.is_floating_point and dtype not in DTYPES]:
        raise HFTError(f"{bad[0]} is stored in {on_disk[bad[0]]}; give the model in bf16, fp16 or fp32")
    others = [dtype for name, dtype in on_disk.items() if name not in held and dtype.is_floating_point]
    found = {}
    for name, tensor in held.items():
        sources = [name] if name in on_disk else revert_weight_conversion(model, {name: tensor})
        found[name] = widest([on_disk[s] for s in sources if s in on_disk] or others or on_disk.values())
    return found


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of names, dtypes, shapes and first 1,024 elements of a checkpoint's tensors: it tells models apart."""
    weights, digest = Weights(folder), hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor.reshape(-1)[:1024]).numpy())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weights files of a folder, as transformers finds them: safetensors before .bin, one before an index's."""
    for single, index in ((SAFE_FILE, SAFE_INDEX), (TORCH_FILE, TORCH_INDEX)):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HFTError(f"{folder / index} is not a valid index of weights; fetch or save it again") from error
            return [folder / name for name in sorted(shards)]
    raise HFTError(f"{folder} holds no weights: neither {SAFE_FILE} nor {TORCH_FILE}, whole or in shards")


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a whole model: the path itself, or where the Hub's files lie once they are downloaded."""
    folder = downloaded(model, revision)
    check_whole(folder, model)
    return folder


def check_is_there(model: str) -> None:
    """Refuse a path that does not exist, which the Hub would be asked for."""
    path = Path(model)
    if path.is_file():
        raise HFTError(f"{model} is a file; give the folder of a model")
    # The Hub's ids are NAME or OWNER/NAME.
    local = path.is_absolute() or model.startswith(LOCAL_PREFIXES) or model.count("/") > 1 or model.endswith("/")
    if local and not path.exists():
        made = f"; `hft fetch {path.name}` makes it" if path.name in MADE and path.parts[:1] == ("models",) else ""
        raise HFTError(f"folder {model} not found{made or neighbor(path)}")


def check_whole(folder: Path, name: str | Path) -> None:
    """Refuse what a run with `save_only_trained` has saved."""
    if (folder / MODEL_CONFIG).exists():
        merge = f"hft merge --method delta --models {name} --base BASE --out NEW"
        raise HFTError(f"{name} holds only what trained; `{merge}` makes the whole model")


def downloaded(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, whole or not: the path itself, or where the Hub's files lie once they are downloaded."""
    if model and Path(model).is_dir():
        return Path(model)
    check_is_there(str(model))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        for wanted in ("*.safetensors", "*.bin"):
            others = [pattern for pattern in WEIGHTS if pattern not in (wanted, "*.index.json")]
            folder = Path(snapshot_download(str(model), revision=revision, ignore_patterns=others))
            if any(folder.glob(wanted)):
                break
        return folder
    except (OSError, HFValidationError) as error:
        raise HFTError(f"{model} is neither a folder nor found on the Hub: {reason(error)}") from error


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(as_bytes(tensor).numpy())
    return digest.hexdigest()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, to compare bit by bit: unlike `==` it tells -0.0 from 0.0 and finds NaN equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds values of all the given ones exactly."""
    return functools.reduce(torch.promote_types, dtypes)
