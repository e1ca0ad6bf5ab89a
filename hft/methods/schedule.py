"""Which units train at which step, for methods that change it while a run goes on. Pure data, as the policies are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hft.errors import HFTError
from hft.model.anatomy import Unit
from hft.selection.policies import Selection, sample_names

# The keys that each schedule takes, with their defaults.
TAKES: dict[str, dict[str, Any]] = {
    "none": {},
    "dynamic": {"intervals": 10, "schedule_seed": 0},
    "lisa": {"switch_every": 20, "active_layers": 2, "optimizer_state": "reset", "schedule_seed": 0},
    "badam": {"switch_every": 50, "block_order": "random", "schedule_seed": 0},
    "autofreeze": {"intervals": 10, "percentile": 50.0},
    "smartfrz": {"intervals": 10},
}
# Schedules that decide by what they measure; those of the others are known before the run.
MEASURING = ("autofreeze", "smartfrz")


@dataclass
class ScheduleConfig:
    """How the units that train change within a run, as a method YAML or the command line gives it.

    A key that is None takes its schedule's default, and must be None under a schedule that does not know it.
    """

    schedule: Literal["none", "dynamic", "lisa", "badam", "autofreeze", "smartfrz"] = field(
        default="none",
        metadata={
            "help": "none: the selection holds for the whole run; dynamic: more and more units are frozen; lisa: a few "
            "layers are drawn again and again; badam: one layer at a time; autofreeze: the first layers are frozen as "
            "their gradients settle; smartfrz: a trained predictor freezes layers by their recent weights."
        },
    )
    switch_every: int | None = field(
        default=None, metadata={"help": "Steps after which other layers train (lisa: 20, badam: 50)."}
    )
    active_layers: int | None = field(default=None, metadata={"help": "Layers that train at a time (lisa: 2)."})
    block_order: Literal["random", "ascending", "descending"] | None = field(
        default=None, metadata={"help": "Order of the layers; random draws it anew for each pass (badam: random)."}
    )
    intervals: int | None = field(
        default=None, metadata={"help": "Parts of the run, of equal length, between which units are frozen (10)."}
    )
    percentile: float | None = field(
        default=None,
        metadata={"help": "Layers before the first whose gradient norm changes by more than this percentile freeze."},
    )
    optimizer_state: Literal["reset", "keep", "offload"] | None = field(
        default=None,
        metadata={
            "help": "What becomes of the optimizer state of a layer that is frozen: reset deletes it, keep keeps it, "
            "offload keeps it in host memory (lisa: reset). The other schedules delete it."
        },
    )
    schedule_seed: int | None = field(
        default=None, metadata={"help": "Seed of what a schedule draws, apart from the training seed (0)."}
    )

    def __post_init__(self):
        takes = TAKES[self.schedule]
        for key in sorted({key for keys in TAKES.values() for key in keys}):
            if getattr(self, key) is None:
                setattr(self, key, takes.get(key))
            elif key not in takes:
                owners = ", ".join(name for name, keys in TAKES.items() if key in keys)
                raise HFTError(f"{key} is a key of schedule {owners}, not of {self.schedule!r}; remove it")
        for key in ("switch_every", "active_layers", "intervals"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise HFTError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise HFTError(f"percentile must lie in 0..100, got {self.percentile}")


def check_schedule(selection: Selection, config: ScheduleConfig) -> None:
    """Refuse a schedule that does not go with a selection.

    Raises:
        HFTError: the selection freezes units itself, or has fewer layers than are to train at a time.
    """
    if config.schedule == "none":
        return
    if selection.config.policy != "all":
        raise HFTError(
            f"schedule {config.schedule} decides itself which units train, so it goes with policy all, not with "
            f"{selection.config.policy}"
        )
    if selection.config.freeze_router:
        raise HFTError(f"schedule {config.schedule} switches whole layers, their routers too; leave freeze_router out")
    layers = selection.anatomy.num_layers
    if (config.active_layers or 0) > layers:
        raise HFTError(f"active_layers is {config.active_layers}, but the model has {layers} layers")


def interval_at(config: ScheduleConfig, steps: int, step: int) -> int:
    """The number of the interval that a step lies in, all counted from 0; between two of them units switch."""
    return step // config.switch_every if config.switch_every else step * config.intervals // steps


def outside(selection: Selection) -> list[str]:
    """Names of the parameters outside the layers that the selection trains."""
    inside = {name for unit in selection.anatomy.units for name in unit.parameters}
    return [name for name in selection.trained_parameters if name not in inside]


def of_layers(selection: Selection, layers: Iterable[int]) -> frozenset[str]:
    """Names of all units of some layers."""
    layers = set(layers)
    return frozenset(unit.name for unit in selection.anatomy.units if unit.layer in layers)


def trained_at(selection: Selection, config: ScheduleConfig, steps: int, step: int) -> frozenset[str]:
    """What trains at a step under a schedule that is known beforehand.

    Args:
        selection: policy `all`, with or without frozen embeddings.
        config: schedule `dynamic`, `lisa` or `badam`.
        steps: steps of the whole run.
        step: from 0.

    Returns:
        Names of units, and of parameters outside the layers.
    """
    rule = {"dynamic": _dynamic, "lisa": _lisa, "badam": _badam}[config.schedule]
    return frozenset(rule(selection, config, interval_at(config, steps, step)))


def _dynamic(selection: Selection, config: ScheduleConfig, interval: int) -> Iterable[str]:
    """Dynamic freezing (A.4.11, Table 22): all trains at first, and after each tenth of the run a tenth more freezes.

    A tenth is one of the layers' scalars, in whole units, drawn at random; which units the paper freezes it does not
    say. The last tenth of the run trains the last tenth of the scalars. Embeddings, head and final norm train
    throughout, as under HFT. Units that share a parameter freeze together.
    """
    groups: dict[tuple[str, ...], list[Unit]] = {}
    for unit in selection.anatomy.units:
        groups.setdefault(unit.parameters, []).append(unit)
    by_name = {units[0].name: units for units in groups.values()}
    target, size = selection.anatomy.numel_in_layers * interval / config.intervals, 0
    trained = outside(selection)
    for name in sample_names(by_name, len(by_name), "dynamic", config.schedule_seed, selection.config.round):
        group_size = sum(unit.numel for unit in by_name[name])
        if size + group_size / 2 > target:
            trained += [unit.name for unit in by_name[name]]
        size += group_size
    return trained


def _lisa(selection: Selection, config: ScheduleConfig, interval: int) -> Iterable[str]:
    """LISA (arXiv 2403.17919): a few layers, drawn uniformly in each interval; what is outside always trains."""
    names = map(str, range(selection.anatomy.num_layers))
    layers = map(
        int, sample_names(names, config.active_layers, "lisa", config.schedule_seed, selection.config.round, interval)
    )
    return of_layers(selection, layers).union(outside(selection))


def _badam(selection: Selection, config: ScheduleConfig, interval: int) -> Iterable[str]:
    """BAdam (arXiv 2404.02827): one block at a time. A layer is a block, and embeddings, final norm and head are one.

    Frozen embeddings (`freeze_embeddings`, the method's default) leave the layers only: the final norm stays, too.
    """
    blocks = selection.anatomy.num_layers + (not selection.config.freeze_embeddings)
    turn, position = divmod(interval, blocks)
    if config.block_order == "random":
        names = sample_names(
            map(str, range(blocks)), blocks, "badam", config.schedule_seed, selection.config.round, turn
        )
        block = int(names[position])
    else:
        block = position if config.block_order == "ascending" else blocks - 1 - position
    return of_layers(selection, [block]) or outside(selection)


def next_start(before: Sequence[float], now: Sequence[float], start: int, percentile: float) -> int:
    """AutoFreeze's rule (arXiv 2102.01386): the first layer that goes on training.

    Args:
        before: gradient norm of each layer in the interval before the last.
        now: gradient norm of each layer in the last interval.
        start: the first layer that has trained so far.
        percentile: of the relative changes of the layers from `start` on; the first layer that reaches it trains on.

    Returns:
        The new `start`; never less than the old one, and never past the last layer.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.abs(np.subtract(before, now)[start:]) / np.asarray(before)[start:]
    reached = np.flatnonzero(change >= np.percentile(change, percentile))
    return start + int(reached[0]) if len(reached) else start  # a NaN freezes nothing


def stages(selection: Selection, config: ScheduleConfig, steps: int) -> list[tuple[int, frozenset[str]]]:
    """First step and trained names of each interval of a schedule that is known beforehand."""
    first = {interval_at(config, steps, step): step for step in reversed(range(steps))}
    return [(step, trained_at(selection, config, steps, step)) for step in sorted(first.values())]


def share(units: Iterable[Unit], trained: frozenset[str]) -> float:
    """Scalars in the units that train / scalars in all of them."""
    units = list(units)
    return sum(unit.numel for unit in units if unit.name in trained) / sum(unit.numel for unit in units)


def mean_fraction(selection: Selection, begun: Sequence[tuple[int, frozenset[str]]], steps: int) -> float:
    """Trainable share of the layers, averaged over the steps, given the stages by their first steps."""
    ends = [step for step, _ in begun[1:]] + [steps]
    units = selection.anatomy.units
    return sum(share(units, names) * (end - step) for (step, names), end in zip(begun, ends, strict=True)) / steps


def peak_numel(selection: Selection, config: ScheduleConfig) -> int:
    """The most scalars that have a gradient or optimizer state at once."""
    anatomy = selection.anatomy
    at_once = {"lisa": config.active_layers, "badam": 1}.get(config.schedule)
    if at_once is None or config.optimizer_state == "keep":
        return selection.num_trained
    layers = sorted(sum(unit.numel for unit in anatomy.layer(layer)) for layer in range(anatomy.num_layers))
    ends = selection.num_trained - selection.num_trained_in_layers
    return sum(layers[-at_once:]) + ends if config.schedule == "lisa" else max(layers[-1], ends)


def describe(selection: Selection, config: ScheduleConfig, steps: int) -> str:
    """Two lines for people: what trains in which stage, and the trainable fractions."""
    units, layers = selection.anatomy.units, selection.anatomy.num_layers
    if config.schedule in MEASURING:
        return (
            f"{config.schedule} schedule: all {len(units)} units train at first; what freezes is decided after each of "
            f"{config.intervals} intervals\n"
        )
    begun = stages(selection, config, steps)
    counts = [sum(unit.name in trained for unit in units) for _, trained in begun]
    counts = counts if len(set(counts)) > 1 and len(counts) <= 20 else counts[:1]
    ever = frozenset().union(*(trained for _, trained in begun))
    ever_layers = sum(any(unit.name in ever for unit in selection.anatomy.layer(layer)) for layer in range(layers))
    first, last = (share(units, begun[index][1]) for index in (0, -1))
    return (
        f"{config.schedule} schedule, seed {config.schedule_seed}: {len(begun)} stages, in which "
        f"{', '.join(map(str, counts))} of {len(units)} units train; {ever_layers} of {layers} layers train at some "
        f"stage\ntrainable fraction of the layers {first:.1%} at first, {last:.1%} at last, "
        f"{mean_fraction(selection, begun, steps):.1%} on average\n"
    )


def to_row(selection: Selection, step: int, trained: frozenset[str]) -> dict[str, Any]:
    """A stage as JSON: its first step, the layers that train whole, the units of other layers, and what is outside."""
    anatomy = selection.anatomy
    layers = [index for index in range(anatomy.num_layers) if of_layers(selection, [index]) <= trained]
    units = [unit.name for unit in anatomy.units if unit.name in trained and unit.layer not in layers]
    return {"step": step, "layers": layers, "units": units, "outside": [n for n in outside(selection) if n in trained]}


def from_row(selection: Selection, row: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """First step and trained names of a stage that `to_row` wrote."""
    return row["step"], of_layers(selection, row["layers"]).union(row["units"], row["outside"])
