"""Load run folders; group runs that differ only in seed."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hft.errors import HFTError, neighbor, reason
from hft.evaluation.subject import folder_of
from hft.objectives import OBJECTIVES, find_objective
from hft.record.checkpoints import TRAINER_STATE, checkpoints
from hft.record.manifest import MANIFEST_NAME, Manifest
from hft.record.scores import SuiteScores, rows_of, scores_of
from hft.reporting.measure import Column, Measured, measure
from hft.runs.result import CONFIG_NAME, RESULTS_NAME, RunResult

if TYPE_CHECKING:
    from pandas import DataFrame

# What `hft.runs.config.run_name` adds to the name of a run with other seeds.
SEED_IN_NAME = re.compile(r"-(selection_|data_)?seed=\d+")
SEEDS = ("selection_seed", "seed", "data_seed")
ORIGINS = ("base", "model_name_or_path", "tuned", "models")  # settings that name other models
FIRST = ("base", "fft", "hft")  # the order of methods; others follow by name
# What `hft diff`, a sequence of runs and `hft keep` write, and the keys that a report takes from it.
EXTRAS = {
    "diff.json": ("layers", "rounds"),
    "matrix.json": ("tasks", "rounds", "scores", "op", "bwt"),
    "keep.json": ("method", "points"),
}
SEQUENCE_CONFIG = "recipe.yaml"


@dataclass(frozen=True)
class LoadedRun:
    """One folder: a training run, a reset, a merge, or a model that was only scored."""

    folder: Path
    model: str  # name of the pretrained model that it goes back to, without path or organization
    method: str  # as its config has it; `half-reset` for a reset, `base` for a plain model
    settings: dict[str, Any]  # without seeds; runs that agree in all of them form a group
    order: tuple[int | None, int | None]  # what seeds the order of its batches
    manifest: Manifest | None  # None for merges and plain models
    result: RunResult | None  # None for an unfinished run, and for what was not trained
    scores: dict[str, SuiteScores]  # by suite

    @functools.cached_property
    def rows(self) -> Callable[[str, str], DataFrame | None]:
        """By suite and task, each read once."""
        return functools.cache(functools.partial(rows_of, self.folder))

    @functools.cached_property
    def steps(self) -> dict[int, dict[str, SuiteScores]]:
        """The scores of its checkpoints, by step."""
        scored = ((path, scores_of(path)) for path in checkpoints(self.folder))
        return {int(path.name.rpartition("-")[2]): found for path, found in scored if found}

    @functools.cached_property
    def states(self) -> list[Path]:
        """What the trainer saved of itself, oldest first."""
        return [path / TRAINER_STATE for path in checkpoints(self.folder) if (path / TRAINER_STATE).exists()]

    @property
    def losses(self) -> list[tuple[int, float]]:
        log = read_json(self.states[-1], ["log_history"])["log_history"] if self.states else []
        return [(row["step"], row["loss"]) for row in log if "loss" in row]

    @property
    def optimizer_bytes(self) -> int | None:
        """Of the optimizer state in the last checkpoint, one file or FSDP's folder; None if it was not saved."""
        states = self.states[-1].parent.glob("optimizer*") if self.states else []
        files = [path for state in states for path in (state, *state.rglob("*")) if path.is_file()]
        return sum(path.stat().st_size for path in files) or None

    @property
    def objective(self) -> str:
        return self.result.objective if self.result else ""

    @property
    def learning_rate(self) -> float | None:
        rate = self.settings.get("learning_rate")
        return rate and rate * self.settings.get("learning_rate_factor", 1.0)

    @property
    def fractions(self) -> dict[str, float]:
        """Trainable fraction of the `layers`, on average under a schedule, and of the `model`; empty if unknown."""
        made = self.manifest
        mean = {"layers": made.schedule["fractions"]["mean"]} if made and "fractions" in made.schedule else {}
        return made.trainable_fraction | mean if made else {}

    @property
    def is_ratio(self) -> bool:
        """Whether it is HFT at some fraction, or full fine-tuning, and no other method."""
        made = self.manifest
        if not made or made.schedule or made.tuned or made.update != {"update": "plain"}:
            return False
        by_name = made.selection.get("freeze") or made.selection.get("freeze_embeddings")
        return made.selection.get("policy") in ("category", "all") and not by_name

    @property
    def is_full(self) -> bool:
        return self.is_ratio and self.manifest.selection["policy"] == "all"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds."""

    runs: list[LoadedRun]
    arm: str  # the method, after the objective if there are several, and the settings that tell it from other groups
    label: str  # the arm, with its learning rate where there are several

    @property
    def first(self) -> LoadedRun:
        return self.runs[0]

    def measure(self, column: Column) -> Measured | None:
        return measure(column.keys, [run.scores for run in self.runs])


@dataclass(frozen=True)
class Collection:
    """What some folders hold: groups by model, and for each file of `EXTRAS` its contents by the name of its folder."""

    models: dict[str, list[Group]]
    extras: dict[str, dict[str, dict[str, Any]]]

    @property
    def groups(self) -> list[Group]:
        return [group for groups in self.models.values() for group in groups]


def collect(folders: Iterable[str | Path]) -> Collection:
    """Read folders of runs, resets, merges, scored models, `hft diff` and sequences."""
    runs: list[LoadedRun] = []
    extras: dict[str, dict[str, Any]] = {name: {} for name in EXTRAS}
    for folder, given in {folder_of(str(given)).resolve(): given for given in folders}.items():
        names = [name for name in EXTRAS if (folder / name).exists()]
        for name in names:
            extras[name][folder.name] = read_json(folder / name, EXTRAS[name]) | {"folder": folder}
        if "matrix.json" not in names and (run := read_run(folder)):  # a sequence is not a run
            runs.append(run)
        elif not names:
            what = f"{given} holds no run and no scores{neighbor(Path(given))}"
            raise HFTError(f"{what}; give folders of runs, or of models that were scored")
    return Collection(group_by_model(runs), extras)


def read_run(folder: Path) -> LoadedRun | None:
    """None if the folder is neither a run nor a model that was scored."""
    config, manifest, scores = run_config(folder), run_manifest(folder), scores_of(folder)
    result = RunResult.load(folder) if (folder / RESULTS_NAME).exists() else None
    if config or manifest:
        method = run_method(config, manifest) or folder.name  # one of CPI-FT has none
        model, settings = pretrained(folder), run_settings(config or manifest.selection)
    elif scores:
        name = next(iter(scores.values()))[0].model
        model, method, settings = Path(name).name, "base", {"model": name}
    else:
        return None
    order = config.get("seed"), config.get("data_seed")
    return LoadedRun(folder, model, method, settings, order, manifest, result, scores)


def run_config(folder: Path) -> dict[str, Any]:
    """The config of a run, or what the runs of a sequence have in common; empty without one."""
    from hft.runs.config import read_saved_config  # torch, which `hft paper` does without

    found = (folder / name for name in (CONFIG_NAME, SEQUENCE_CONFIG) if (folder / name).exists())
    return next(map(read_saved_config, found), {})


def run_manifest(folder: Path) -> Manifest | None:
    return Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None


def pretrained(model: str | Path) -> str:
    """The name of the model that another goes back to, without path or organization."""
    config, manifest = run_config(Path(model)), run_manifest(Path(model))
    if manifest:
        origin = manifest.earlier[0]["base"] if manifest.earlier else manifest.base
    else:
        origin = next((config[key] for key in ORIGINS if config.get(key)), None)
    if origin:
        return pretrained(origin[0] if isinstance(origin, list) else origin)
    cached = re.search(r"models--[^/]+--([^/]+)", str(model))  # of the Hub
    return cached[1] if cached else Path(model).name


def run_method(config: Mapping[str, Any], manifest: Manifest | None) -> str:
    """The method by the config, or for what was made from Python by the manifest."""
    if manifest and manifest.tuned:
        return "half-reset"
    made = manifest.selection if manifest else {}
    policy = made.get("policy", "")
    return config.get("method") or made.get("adapter") or {"category": "hft", "all": "fft"}.get(policy, policy)


def run_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without seeds; models that it starts from by theirs, else by name; a merge has their learning rate."""
    from hft.runs.config import is_neutral

    others = (*SEEDS, "out")
    settings = {key: value for key, value in config.items() if not is_neutral(key, config) and key not in others}
    for key in settings.keys() & set(ORIGINS):
        names = settings[key] if isinstance(settings[key], list) else [settings[key] or ""]
        settings[key] = [run_settings(run_config(Path(name))) or SEED_IN_NAME.sub("", name) for name in names]
    if "learning_rate" not in settings:
        rates = [origin.pop("learning_rate", None) for origin in origins_of(settings)]
        settings |= {"learning_rate": rates[0]} if rates and rates[0] else {}
    return settings


def origins_of(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [one for key in ("tuned", "models") for one in settings.get(key) or [] if isinstance(one, dict)]


def read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in keys}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise HFTError(f"{path} is not valid: {type(error).__name__} {reason(error)}") from error


def group_by_model(runs: Sequence[LoadedRun]) -> dict[str, list[Group]]:
    """Groups of runs by the name of their model: base, then by objective, method and learning rate."""
    found: dict[str, dict[str, list[LoadedRun]]] = {}
    for run in sorted(runs, key=order_of):
        same = json.dumps([run.objective, run.method, run.settings], sort_keys=True, default=str)
        found.setdefault(run.model, {}).setdefault(same, []).append(run)
    return {model: [named(some, [*groups.values()]) for some in groups.values()] for model, groups in found.items()}


def order_of(run: LoadedRun) -> tuple[Any, ...]:
    method = [*FIRST, run.method].index(run.method)
    objective = find_objective(run.objective).order if run.objective else len(OBJECTIVES)
    return run.model, method > 0, objective, method, run.method, run.learning_rate or 0


def named(runs: list[LoadedRun], groups: Sequence[list[LoadedRun]]) -> Group:
    """A group, by what tells it from the others: settings of its recipe that few have, of its method, and the rate."""
    from hft.runs.config import replaced_keys

    run, others = runs[0], [group[0] for group in groups]
    peers = [other for other in others if (other.objective, other.method) == (run.objective, run.method)]
    several = run.objective and len({other.objective for other in others} - {""}) > 1
    words, of_method = [run.objective.upper()] if several else [], replaced_keys(run.settings)
    words.append(run.method)
    for key, value in sorted(run.settings.items(), key=lambda item: item[0] in of_method):
        theirs = [other.settings[key] for other in others if key in other.settings]
        usual = key not in of_method and 2 * theirs.count(value) > len(theirs)
        same = all(peer.settings.get(key) == value for peer in peers)
        if not (usual or same or value is None or key.startswith("learning_rate")):
            shown = value[0] if key in ORIGINS else value
            shown = shown["method"] if isinstance(shown, dict) else Path(str(shown)).name
            words.append(f"{'from' if key in ORIGINS else key.removesuffix('_fraction').replace('_', ' ')} {shown}")
    rates = run.learning_rate and len({peer.learning_rate for peer in peers}) > 1
    return Group(runs, " ".join(words), " ".join([*words, *([rate_text(run.learning_rate)] if rates else [])]))


def rate_text(rate: float) -> str:
    return np.format_float_scientific(rate, precision=2, trim="-", exp_digits=1)


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """Full fine-tuning with a group's recipe; without one, the only full fine-tuning of its objective."""
    run = group.first
    made_from = origins_of(run.settings)
    settings = made_from[0] | {"learning_rate": run.learning_rate} if made_from else run.settings
    full = [one for one in groups if one.first.is_full and run.objective in ("", one.first.objective)]
    # What an FFT run has beside these two keys is its recipe.
    recipes = [{k: v for k, v in one.first.settings.items() if k not in ("method", "policy")} for one in full]
    same = [one for one, recipe in zip(full, recipes, strict=True) if recipe.items() <= settings.items()]
    found = same or full
    return found[0] if len(found) == 1 else None
