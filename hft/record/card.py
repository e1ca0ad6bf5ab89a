"""The model card: a README.md with what a model is, how it was made and what `hft verify` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
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
        method=portable(config.get("method")),
        parts=part_facts(manifest),
        datasets=data_facts(manifest, config.get("dataset_name") or []),
        verified=verified and Counter(verified),
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
    usual = {f.name: f.default for f in fields(args)} | {"output_dir": args.output_dir, "run_name": args.run_name}
    values = {key: value for key, value in args.to_dict().items() if isinstance(value, bool | int | float | str)}
    return {key: value for key, value in values.items() if value != usual.get(key)}


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


def data_facts(manifest: Manifest, names: str | list[str]) -> list[str]:
    """Each dataset as a link to the Hub, or by the names of its folder and files; `names` are the config's."""
    names, facts = portable(names if isinstance(names, list) else [names]), []
    for data, name in zip_longest(datasets_of(manifest), names):
        if data and "id" in data:
            revision = f" at {data['revision']}" if data.get("revision") else ""
            facts.append(linked(data["id"], "datasets/") + revision)
        elif data and data.get("files"):
            files = shorten([f"`{file}`" for file in data["files"] if file != name])
            facts.append(": ".join(filter(None, [name and f"`{name}`", files])))
    return facts


def datasets_of(manifest: Manifest) -> list[dict[str, Any]]:
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
            what = POLICIES[name] if kind == "policy" else find_method(kind, name).description()
        rows.append((kind, f"{portable(name)}: {what}" if what else portable(name)))
    return rows
