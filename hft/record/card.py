"""The model card: a README.md with what a model is, how it was made and what `hft verify` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.config import SECRETS, to_yaml
from hft.errors import shorten
from hft.methods import find_method
from hft.record.manifest import Manifest
from hft.record.scores import answers_of, scores_of
from hft.selection.selection import POLICIES
from hft.text import escaped

if TYPE_CHECKING:
    from transformers import TrainingArguments

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(
    folder: str | Path,
    manifest: Manifest,
    config: Mapping[str, Any],
    tags: Sequence[str],
    *,
    verified: Mapping[str, int] | None = None,
    model_id: str | None = None,
) -> Path:
    """Write the model card of a folder, in which local paths are reduced to their last part."""
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    name = folder.resolve().name
    starts = [manifest.tuned, manifest.base, *(one["base"] for one in reversed(manifest.earlier))]
    data = ModelCardData(
        base_model=next((start for start in starts if start and not is_local(start)), None),
        **next(filter(None, map(license_of, filter(None, starts))), {}),
        datasets=[one["id"] for one in datasets_of(manifest) if "id" in one] or None,
        library_name="peft" if manifest.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=model_id or ".",
        manifest=manifest,
        linked=linked,
        escaped=escaped,
        base_id=portable(manifest.base),
        facts=card_facts(manifest, config, verified),
        answers=answers_of(folder)[:3],
        scores=[(suite, score) for suite, found in scores_of(folder).items() for score in found.scores],
        settings=to_yaml(portable({key: value for key, value in config.items() if key not in SECRETS})),
    )
    card.save(folder / CARD_NAME)
    return folder / CARD_NAME


def license_of(model: str) -> dict[str, str]:
    """What the card of a model says of its license, if the card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = Path(model, CARD_NAME) if is_local(model) else try_to_load_from_cache(model, CARD_NAME)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The plain values of a trainer's config that are not its defaults, but for names and folders."""
    changed = {}
    for f in fields(args):
        value = getattr(args, f.name)
        value = value.value if isinstance(value, Enum) else value
        if isinstance(value, bool | int | float | str) and value != f.default:
            changed[f.name] = value
    return {key: value for key, value in changed.items() if key not in ("output_dir", "run_name")}


def is_local(name: str) -> bool:
    """Whether a name is a path that holds on this machine only, or leaves the folder it is read in."""
    return Path(name).is_absolute() or name.startswith(("~", "../"))


def portable(value: Any) -> Any:
    """A value in which such paths are reduced to their last part."""
    if isinstance(value, Mapping):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def linked(name: str, kind: str = "") -> str:
    """A model or dataset as a link to the Hub, or by the name of its folder."""
    return f"`{portable(name)}`" if is_local(name) else f"[{name}](https://huggingface.co/{kind}{name})"


def card_facts(
    manifest: Manifest, config: Mapping[str, Any], verified: Mapping[str, int] | None
) -> list[tuple[str, str]]:
    rows = [("method", portable(config["method"]))] if config.get("method") else []
    rows += [*part_facts(manifest), *size_facts(manifest)]
    names = config.get("dataset_name") or []
    names = portable(names if isinstance(names, list) else [names])
    for data, name in zip_longest(datasets_of(manifest), names):
        if data and "id" in data:
            revision = f" at {data['revision']}" if data.get("revision") else ""
            rows.append(("data", linked(data["id"], "datasets/") + revision))
        elif data and data.get("files"):
            files = shorten([f"`{file}`" for file in data["files"] if file != name])
            rows.append(("data", ": ".join(filter(None, [name and f"`{name}`", files]))))
    result = verify_fact(Counter(verified), "reset" if manifest.tuned else "frozen") if verified else "has not run yet"
    return [*rows, ("verify", result)]


def datasets_of(manifest: Manifest) -> list[dict[str, Any]]:
    """What identifies each dataset that a run was trained on."""
    return manifest.data.get("datasets", [manifest.data])


def part_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """The policy, schedule, update and adapter of a run, each with what it does."""
    selection, schedule = manifest.selection, manifest.schedule.get("config", {})
    named = {"policy": selection.get("policy"), "schedule": schedule.get("schedule")}
    named |= {"update": manifest.update.get("update"), "adapter": selection.get("adapter")}
    named = {kind: name for kind, name in named.items() if name not in (None, "plain")}
    rows = []
    for kind, name in named.items():
        what = None
        if ":" not in name:  # FILE.py:NAME may not be there any more
            what = POLICIES[name] if kind == "policy" else find_method(kind, name).description
        rows.append((kind, f"{portable(name)}: {what}" if what else portable(name)))
    return rows


def size_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Which selection it is, and how much trains; of a Half-Reset, how much stays tuned."""
    selection, fraction = manifest.selection, manifest.trainable_fraction
    if manifest.is_adapter:
        return [("trainable fraction", f"{fraction['model']:.2%} of the size of the base, which is frozen whole")]
    which = f"seed {selection['selection_seed']}, round {selection['round']}"
    counts = [f"{block} {trained} of {total}" for block, (trained, total) in manifest.counts.items()]
    ends = f"embeddings and head {'none' if selection['freeze_embeddings'] else 'all'}"
    size = f"{fraction['layers']:.1%} of the layers, {fraction['model']:.1%} of the whole model"
    if over_steps := manifest.schedule.get("fractions"):
        size += f"; of the layers {over_steps['mean']:.1%} at a time, on average"
    return [
        ("selection", which + (f", after {len(manifest.earlier)} earlier" if manifest.earlier else "")),
        ("units that stay tuned" if manifest.tuned else "units that train", ", ".join([*counts, ends])),
        ("fraction that stays tuned" if manifest.tuned else "trainable fraction", size),
    ]


def verify_fact(count: Counter[str], kind: str) -> str:
    """What verify found, in a line; `kind` is how the tensors are called that must equal the base's."""
    total, trained = count["identical"] + count["broken"], count["changed"] + count["unchanged"]
    verdict = "FAILED" if count["broken"] + count["lost"] + count["unlisted"] else "passed"
    moved = f", {count['changed']} of {trained} trained tensors changed" if trained else ""
    new = f", {count['new']} are new" if count["new"] else ""
    return f"{verdict}: {count['identical']} of {total} {kind} tensors bit-identical to the base{moved}{new}"
