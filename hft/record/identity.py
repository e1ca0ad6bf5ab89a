"""Whether two runs are the same one."""

from collections.abc import Mapping
from typing import Any

from hft.errors import HFTError


def identity_of(
    selection: Mapping[str, Any],
    update: Mapping[str, Any] | None,
    schedule: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
    strategy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What makes two runs the same, as far as it is known before anything is loaded: the `record()` of each part."""
    kind = "adapter" if "adapter" in selection else "selection"
    record = {"selection": None, "adapter": None, kind: selection, "schedule": schedule or None}
    record |= {"strategy": strategy or None, "update": update or {"update": "plain"}}
    return record | ({"data": data} if data else {})


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
    """Refuse to resume from the checkpoint of another run; the error names every key that differs.

    torch would load its optimizer state without complaint, since all halves are equally large, and continue with the
    moments of other matrices. Compared is what both identities hold: before data is loaded ours lacks it.
    """
    found = differences({key: ours[key] for key in ours if key in theirs}, {k: theirs[k] for k in theirs if k in ours})
    if found:
        raise HFTError(
            f"cannot resume from {folder}: it was trained with other settings ({'; '.join(found)}); give the same "
            "settings, another --output_dir, or --resume_from_checkpoint none"
        )
