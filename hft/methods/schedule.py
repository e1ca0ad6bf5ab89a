"""What a schedule is: which units train at which step. Pure data, as policies are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from hft.errors import HFTError
from hft.methods.part import MethodPart

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from hft.model.anatomy import Unit
    from hft.selection import Selection

# The first step of a phase, and the names of the units and of the parameters outside the layers that train in it.
Phase = tuple[int, frozenset[str]]


@dataclass
class Schedule(MethodPart):
    """A rule that changes within a run which units train.

    A subclass defines `trained_at`. If it decides from measurements, it sets `known_before_run = False`, defines
    `decide` instead, and may measure in `on_gradients`.

    Attributes:
        known_before_run: whether every step is known before the run.
        clears_state: whether the optimizer state of all parameters is deleted at each switch.
        optimizer_state: what happens to the optimizer state of a parameter that freezes: reset, keep or offload.
    """

    kind: ClassVar[str] = "schedule"
    known_before_run: ClassVar[bool] = True
    clears_state: ClassVar[bool] = False
    optimizer_state: ClassVar[str] = "reset"

    def interval_at(self, steps: int, step: int) -> int:
        """The number of the interval that a step lies in, both counted from 0; units switch between intervals."""
        return step // self.switch_every if hasattr(self, "switch_every") else step * self.intervals // steps

    def trained_at(self, selection: Selection, step: int, steps: int) -> frozenset[str]:
        """Names of the units, and of parameters outside the layers, that train at a step, counted from 0, of a run."""
        raise NotImplementedError(f"{type(self).__name__} must define trained_at")

    def decide(
        self, selection: Selection, step: int, steps: int, model: nn.Module, measured: dict[str, Any]
    ) -> frozenset[str]:
        """What trains at a step, given the model and the measurements, which checkpoints save."""
        return self.trained_at(selection, step, steps)

    def on_gradients(self, selection: Selection, model: nn.Module, measured: dict[str, Any]) -> None:
        """Measure the gradient as the optimizer gets it: of all micro-batches and processes, and clipped."""

    def check(self, selection: Selection) -> None:
        """Raise an `HFTError` for a selection that freezes units itself."""
        if selection.config.policy != "all":
            what = f"schedule {self.name} decides itself which units train"
            raise HFTError(f"{what}, so it goes with policy all, not with {selection.config.policy}")
        if selection.config.freeze_router:
            raise HFTError(f"schedule {self.name} switches whole layers, with their routers; remove freeze_router")

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise HFTError("reentrant checkpointing loses gradients under a schedule; set use_reentrant: false")
        if args.fp16:
            raise HFTError("a schedule is untested with fp16, whose scaler skips steps; set bf16")
        if args.restore_callback_states_from_checkpoint:
            raise HFTError("a schedule restores its own state; remove restore_callback_states_from_checkpoint")

    def peak_numel(self, selection: Selection) -> int:
        """The most parameters that have a gradient or optimizer state at once."""
        return selection.num_trained

    def phases(self, selection: Selection, steps: int) -> list[Phase]:
        """A phase per interval of a run."""
        first = {self.interval_at(steps, step): step for step in reversed(range(steps))}
        return [(step, self.trained_at(selection, step, steps)) for step in sorted(first.values())]

    def describe(self, selection: Selection, steps: int) -> str:
        """Two lines for people: what trains in which phase, and the trainable fractions."""
        units, num_layers = selection.anatomy.units, selection.anatomy.num_layers
        if not self.known_before_run:
            return (
                f"{self.name} schedule: all {len(units)} units train at first; what freezes is decided after each of "
                f"{self.intervals} intervals"
            )
        phases = self.phases(selection, steps)
        counts = [sum(unit.name in trained for unit in units) for _, trained in phases]
        counts = counts if len(set(counts)) > 1 and len(counts) <= 20 else counts[:1]
        ever_layers = len({unit.layer for unit in units if unit.name in trained_in(phases)})
        fractions = fractions_of(selection, phases, steps)
        seed = f", seed {self.schedule_seed}" if hasattr(self, "schedule_seed") else ""
        return (
            f"{self.name} schedule{seed}: {len(phases)} phases, in which {', '.join(map(str, counts))} of {len(units)} "
            f"units train; {ever_layers} of {num_layers} layers train in some phase\n"
            f"trainable fraction of the layers {fractions['first']:.1%} at first, {fractions['last']:.1%} at last, "
            f"{fractions['mean']:.1%} on average"
        )


def outside_layers(selection: Selection) -> list[str]:
    """Names of the parameters outside the layers that the selection trains."""
    return [name for name in selection.trained_parameters if name in selection.anatomy.outside_layers]


def units_of_layers(selection: Selection, layers: Iterable[int]) -> frozenset[str]:
    """Names of all units of the given layers."""
    layers = set(layers)
    return frozenset(unit.name for unit in selection.anatomy.units if unit.layer in layers)


def layers_and_ends(selection: Selection, layers: Collection[int]) -> frozenset[str]:
    """The units of given layers and what is outside, but the input embeddings only together with the first layer."""
    first = next(iter(selection.anatomy.embeddings))  # in model order, so that of the input
    outside = [name for name in outside_layers(selection) if 0 in layers or name != first]
    return units_of_layers(selection, layers).union(outside)


def parameters_of(selection: Selection, trained: frozenset[str]) -> set[str]:
    """Names of the parameters that train, given the names of units and of parameters outside the layers."""
    names = {name for unit in selection.anatomy.units if unit.name in trained for name in unit.parameters}
    return names | trained.intersection(outside_layers(selection))


def layer_sizes(selection: Selection) -> list[int]:
    return [sum(unit.numel for unit in layer) for layer in selection.anatomy.layers]


def trained_in(phases: Iterable[Phase]) -> frozenset[str]:
    return frozenset().union(*(trained for _, trained in phases))


def trained_fraction(units: Sequence[Unit], trained: frozenset[str]) -> float:
    return sum(unit.numel for unit in units if unit.name in trained) / sum(unit.numel for unit in units)


def fractions_of(selection: Selection, phases: Sequence[Phase], steps: int) -> dict[str, float]:
    """Trainable fraction of the layers in the first and the last phase, and its mean over the steps."""
    fractions = [trained_fraction(selection.anatomy.units, trained) for _, trained in phases]
    lengths = (end - start for start, end in pairwise([*(step for step, _ in phases), steps]))
    mean = sum(fraction * length for fraction, length in zip(fractions, lengths, strict=True)) / steps
    return {"first": fractions[0], "last": fractions[-1], "mean": mean}


def to_row(selection: Selection, step: int, trained: frozenset[str]) -> dict[str, Any]:
    """A phase as JSON: its first step, the layers that train whole, the units of other layers, and what is outside."""
    anatomy = selection.anatomy
    layers = [index for index, layer in enumerate(anatomy.layers) if all(unit.name in trained for unit in layer)]
    units = [unit.name for unit in anatomy.units if unit.name in trained and unit.layer not in layers]
    outside = [name for name in outside_layers(selection) if name in trained]
    return {"step": step, "layers": layers, "units": units, "outside": outside}


def from_row(selection: Selection, row: Mapping[str, Any]) -> Phase:
    return row["step"], units_of_layers(selection, row["layers"]).union(row["units"], row["outside"])
