"""What a number or a run depends on, computed from what was used; whether two runs are the same one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hft.errors import HFTError, reason
from hft.userfile import file_digest

# The files of a model's folder, beside its weights, that decide what it computes. Weights are found by their index.
PARTS = {
    "config": ("config.json", "hft_model_config.json", "adapter_config.json"),  # without torch, for `hft paper`
    "generation_config": ("generation_config.json",),
    "tokenizer": ("tokenizer*", "*_tokens*.json", "vocab*", "merges.txt", "*.tiktoken", "*.model", "tekken.json"),
    "chat_template": ("chat_template*", "additional_chat_templates/*"),
}
Record = Mapping[str, Any] | None  # `record()` of a part of a run
# Keys of a config that say who wrote it.
WRITTEN_BY = ("_name_or_path", "transformers_version")


def digests_of(folder: str | Path) -> dict[str, str]:
    """SHA-256 of the weights of a model or adapter, and of each of `PARTS` that is in its folder."""
    from hft.model.weights import weight_files

    adapter = Path(folder, "adapter_model.safetensors")
    files = [adapter] if adapter.exists() else weight_files(Path(folder))
    bar = tqdm(files, desc=f"hashing {Path(folder).name}", unit="file", leave=False, disable=len(files) == 1)
    return {"weights": digest([file_digest(path) for path in bar])} | companions_of(Path(folder))


def companions_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each of `PARTS` that is in a model's folder."""
    found = {}
    for part, patterns in PARTS.items():
        files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
        if files:
            found[part] = digest([[path.name, _meaning(path)] for path in files])
    return found


def _meaning(path: Path) -> Any:
    """A config without who wrote it; of any other file the digest."""
    if path.name not in (*PARTS["config"], *PARTS["generation_config"]):
        return file_digest(path)
    try:
        return {key: value for key, value in json.loads(path.read_text()).items() if key not in WRITTEN_BY}
    except (ValueError, AttributeError) as error:
        raise HFTError(f"{path} is not a valid config: {reason(error)}") from error


def base_digests(base: str) -> dict[str, str]:
    """What identifies a base that is a folder: the digests of its weights and of each of `PARTS`."""
    found = digests_of(base) if base and Path(base).is_dir() else {}
    return {f"{part} of the base": sha for part, sha in found.items()}


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identity_of(
    selection: Mapping[str, Any], update: Record, schedule: Record, data: Record, strategy: Record, base: Record = None
) -> dict[str, Any]:
    """What makes two runs the same, as far as it is known before anything is loaded: the `record()` of each part."""
    kind = "adapter" if "adapter" in selection else "selection"
    record = {"selection": None, "adapter": None, kind: selection, "schedule": schedule or None}
    record |= {"strategy": strategy or None, "update": update or {"update": "plain"}}
    return record | ({"data": data} if data else {}) | ({"base": base} if base else {})


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two nested records differ, as `key theirs there, ours here`; None counts as absent."""
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b)
        elif a != b:
            found.append(f"{key} {_short(b)} there, {_short(a)} here")
    return found


def _short(value: Any) -> str:
    if isinstance(value, Mapping):  # a schedule, update or adapter that the other run does not have
        return str(next(iter(value.values()), "unset"))
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_same_run(ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: object) -> None:
    """Refuse to resume from the checkpoint of another run, by what both identities hold.

    torch would load its optimizer state, since all halves are equally large, and continue with other matrices' moments.
    """
    found = differences({key: ours[key] for key in ours if key in theirs}, {k: theirs[k] for k in theirs if k in ours})
    if found:
        raise cannot_resume(folder, f"it was trained with other settings ({'; '.join(found)})", "the same settings, ")


def cannot_resume(checkpoint: object, why: str, give: str = "") -> HFTError:
    others = "another --output_dir, or --resume_from_checkpoint none"
    return HFTError(f"cannot resume from {checkpoint}: {why}; give {give}{others}")
