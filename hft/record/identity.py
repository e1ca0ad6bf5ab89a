"""What makes two runs the same, as far as it is known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hft.errors import HFTError


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
    """Refuse to resume a run that is not this one.

    torch would load its optimizer state without complaint, since all halves are equally large, and continue with the
    moments of other matrices.

    Args:
        ours: `Manifest.identity` of this run, or as much of it as is known.
        theirs: that of the checkpoint. What an earlier version did not record is not compared.
        folder: the checkpoint, for the message.

    Raises:
        HFTError: they differ; the sentence names every key.
    """
    found = differences({key: ours[key] for key in ours if key in theirs}, {k: theirs[k] for k in theirs if k in ours})
    if found:
        raise HFTError(
            f"cannot resume from {folder}: it was trained with other settings ({'; '.join(found)}); give the same "
            "settings, another --output_dir, or --resume_from_checkpoint none"
        )
