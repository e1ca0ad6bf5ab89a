"""Policies that read files: folders of `hft importance`, cores of CPI-FT, and Spectrum's results."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from hft.errors import HFTError, reason
from hft.model.anatomy import Anatomy, Unit
from hft.model.weights import weights_fingerprint
from hft.selection.masks import Mask, Masks, broadcasts
from hft.selection.selection import Choice, SelectionConfig

IMPORTANCE_NAME = "hft_importance.json"
# What the masks of a folder depend on; what else a config says, such as freeze_embeddings, holds for any folder.
SCORED = ("fraction", "granularity", "score", "invert", "importance_data", "importance_rows", "selection_seed", "round")


def load_scores(folder: str | Path) -> dict[str, Any]:
    """What `hft importance` made a folder from."""
    path = Path(folder) / IMPORTANCE_NAME
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise HFTError(f"{path} not found; give a folder that `hft importance` wrote, or Spectrum's file") from None
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} cannot be read: {reason(error)}; run `hft importance` again") from error


def with_scored_settings(config: SelectionConfig) -> SelectionConfig:
    """The config with the settings that its folder or file was made with; refuses others."""
    if not config.importance:
        raise HFTError("the importance policy needs --importance FOLDER, which `hft importance` writes")
    is_file = Path(config.importance).is_file()
    made = {"score": "snr", "granularity": "unit"} if is_file else load_scores(config.importance)["selection"]
    settings, given = {key: made[key] for key in SCORED if key in made}, asdict(config)
    for key, value in settings.items():
        if given[key] not in (None, value):
            what = f"importance {config.importance} was made with {key} {value}, and {given[key]} is asked for"
            raise HFTError(f"{what}; give the same, or make another with `hft importance`")
    return replace(config, **settings)


def check_scored_base(config: SelectionConfig, base: str) -> None:
    """Refuse a folder whose scores are those of another base; one on the Hub is known by its name."""
    if not config.importance or Path(config.importance).is_file():
        return
    made = load_scores(config.importance)
    same = made["weights"] == weights_fingerprint(Path(base)) if Path(base).is_dir() else made["base"] == base
    if not same:
        what = f"importance {config.importance} was made for {made['base']}"
        raise HFTError(f"{what}, whose weights are not those of {base}; run `hft importance` for this base")


def importance(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """All but what a folder of `hft importance` freezes trains, or what Spectrum's results say."""
    source = Path(config.importance)
    if source.is_file():
        return top_of_each_type(anatomy, config, read_snr(source))
    masks = Masks(source)
    if wrong := [n for n, shape in anatomy.shapes.items() if not broadcasts(masks.shapes.get(n, ()), shape)]:
        raise HFTError(f"importance {source} was made for another model: it has no {wrong[0]} of that size")
    frozen = {name: mask for name, mask in masks.items() if mask.count()}
    whole = {name for name, mask in frozen.items() if mask.count() == mask.numel}
    units = [unit for unit in anatomy.units if not whole.issuperset(unit.parameters)]
    outside = whole - anatomy.shapes.keys()
    return units, {name: None if name in outside else ~mask for name, mask in frozen.items()}


def core(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """All elements but those of the cores train (CPI-FT, 2508.21741, stage 4); or only they do (LoTA, 2406.16797)."""
    if not config.cores:
        raise HFTError("the core policy needs --cores FOLDER [FOLDER ...], which `hft cpi probe` makes")
    union: dict[str, Mask] = {}
    for folder in config.cores:
        core = Masks(folder)
        if wrong := [n for n, size in anatomy.numels.items() if math.prod(core.shapes.get(n, (0,))) != size]:
            raise HFTError(f"core {folder} was made for another model: it has no {wrong[0]} of that size")
        named = ((name, mask) for name, mask in core.items() if name not in anatomy.towers)
        union |= {name: union[name] | mask if name in union else mask for name, mask in named}
    holding = {name for name, mask in union.items() if mask.count()}
    if not config.train_core:
        return anatomy.units, {name: ~union[name] for name in holding}
    # A unit without an element of the core is frozen as a whole, without master weights.
    return [unit for unit in anatomy.units if holding & set(unit.parameters)], union


def read_snr(path: Path) -> dict[str, float]:
    """The signal-to-noise ratio of each module, from Spectrum's results; some that it publishes are sorted by type."""
    ratios: dict[str, float] = {}
    try:
        for name, found in json.loads(path.read_text()).items():
            modules = {name: found["snr"]} if "snr" in found else found
            ratios |= {module: float(snr) for module, snr in modules.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise HFTError(f"{path} is not a file of Spectrum's, MODULE: {{snr, type}}: {reason(error)}") from error
    return ratios


def top_of_each_type(anatomy: Anatomy, config: SelectionConfig, ratios: Mapping[str, float]) -> Choice:
    """Of the modules of each type those with the highest signal-to-noise ratio train (Spectrum, 2406.06623).

    Rounded down, and of equal ratios the first come first, as in the authors' script, which lists the embeddings and
    the head in any case. Nothing else trains, the final norm included.
    """
    modules = _by_type(module for unit in anatomy.units for module in _modules_of_unit(unit))
    trained: set[str] = set()
    for kind, names in _by_type(ratios).items():
        # Each of the embeddings, the head and the final norm is a type.
        if kind not in names and set(names) != set(modules.get(kind, ())):
            raise HFTError(f"importance {config.importance} was made for another model: its layers with {kind} differ")
        names.sort(key=ratios.get, reverse=not config.invert)
        trained.update(names[: math.floor(len(names) * Fraction(str(config.fraction)))])
    units = [unit for unit in anatomy.units if trained.intersection(_modules_of_unit(unit))]
    decoder = f"{anatomy.units[0].name.partition('.')[0]}."  # a head that the base lacks lies beside it, and trains
    norms = {name: name.rpartition(".")[0] for name in anatomy.others if name.startswith(decoder)}
    return units, {name: None for name, module in norms.items() if module not in trained}


def _by_type(modules: Iterable[str]) -> dict[str, list[str]]:
    """Modules by their path in their layer, such as `mlp.up_proj`; outside the layers by name."""
    found: dict[str, list[str]] = {}
    for module in modules:
        parts = module.split(".")
        layer = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
        found.setdefault(".".join(parts[layer + 1 :]), []).append(module)
    return found


def _modules_of_unit(unit: Unit) -> Iterable[str]:
    """The module that is a unit, and the one that it may be a part of, fused with others."""
    return unit.name, unit.name.rpartition(".")[0]
