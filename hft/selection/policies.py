"""Rules that make a selection. Pure: the same anatomy and config give the same selection on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Literal

from hft.anatomy import BLOCKS, Anatomy, Unit
from hft.errors import HFTError


@dataclass
class SelectionConfig:
    """Which units train in a round, as a method YAML or the command line gives it."""

    policy: Literal["category", "layer", "model", "explicit", "all"] = field(
        default="category",
        metadata={
            "help": "category: that fraction of each block of each layer (the paper's HFT, Algorithm 1); layer: every "
            "other layer whole; model: half of all units anywhere; explicit: all but the units that match `freeze`; "
            "all: everything trains (FFT)."
        },
    )
    fraction: float = field(
        default=0.5, metadata={"help": "Fraction that trains, of each block's units, of the layers or of all units."}
    )
    attention_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the attention units, where it differs (category policy)."}
    )
    mlp_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the MLP units, where it differs (category policy)."}
    )
    norm_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the norms, where it differs (category policy)."}
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={"help": "Unit names or kinds to freeze, with * and ? (explicit policy), e.g. q_proj k_proj."},
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Freeze the embeddings and the head too (Tables 6 and 7)."}
    )
    selection_seed: int = field(default=0, metadata={"help": "Seed of the selection, apart from the training seed."})
    round: int = field(default=1, metadata={"help": "Number of this training run in a sequence; each draws anew."})

    def __post_init__(self):
        for name in ("fraction", *(f"{block}_fraction" for block in BLOCKS)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise HFTError(f"{name} must lie in 0..1, got {value}")
            if name != "fraction" and value is not None and self.policy != "category":
                raise HFTError(f"{name} belongs to the category policy, not to {self.policy!r}; remove it")
        if bool(self.freeze) != (self.policy == "explicit"):
            raise HFTError("the explicit policy and `freeze` go together: give both or neither")
        if self.round < 1:
            raise HFTError(f"round counts from 1, got {self.round}")


@dataclass(frozen=True)
class Selection:
    """Which units train in this round, by name, and the anatomy and config it was made from."""

    anatomy: Anatomy
    config: SelectionConfig
    trained: frozenset[str]

    def trains(self, unit: Unit) -> bool:
        return unit.name in self.trained

    @property
    def frozen_parameters(self) -> list[str]:
        """Names of the frozen parameters, in model order."""
        frozen = [name for unit in self.anatomy.units if not self.trains(unit) for name in unit.parameters]
        return frozen + (list(self.anatomy.embeddings) if self.config.freeze_embeddings else [])

    @property
    def trained_parameters(self) -> list[str]:
        """Names of the trained parameters, in model order, then those outside the layers."""
        anatomy = self.anatomy
        trained = [name for unit in anatomy.units if self.trains(unit) for name in unit.parameters]
        return trained + ([] if self.config.freeze_embeddings else list(anatomy.embeddings)) + list(anatomy.others)

    @property
    def trained_layers_size(self) -> int:
        """Trained scalars in the layers."""
        return sum(unit.size for unit in self.anatomy.units if self.trains(unit))

    @property
    def trained_size(self) -> int:
        """Trained scalars in the whole model."""
        anatomy = self.anatomy
        outside = sum(anatomy.others.values())
        outside += 0 if self.config.freeze_embeddings else sum(anatomy.embeddings.values())
        return self.trained_layers_size + outside

    @property
    def share_of_layers(self) -> float:
        """The paper's ratio: trained scalars / scalars in the layers."""
        return self.trained_layers_size / self.anatomy.layers_size

    @property
    def share_of_model(self) -> float:
        """Trained scalars / all scalars."""
        return self.trained_size / self.anatomy.size

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each block, how many of its units train and how many there are."""
        return {
            block: (sum(map(self.trains, units)), len(units))
            for block in BLOCKS
            if (units := [unit for unit in self.anatomy.units if unit.block == block])
        }

    def summary(self) -> str:
        """One line for people: the policy, what trains of each block, and the two shares."""
        c = self.config
        counts = ", ".join(f"{block} {trained}/{total}" for block, (trained, total) in self.counts().items())
        ends = "frozen" if c.freeze_embeddings else "train"
        return (
            f"{c.policy} policy, seed {c.selection_seed}, round {c.round}: {counts} units train; embeddings and head "
            f"{ends}\ntrainable share {self.share_of_layers:.1%} of the layers "
            f"({self.trained_layers_size:,} of {self.anatomy.layers_size:,}), {self.share_of_model:.1%} of the whole "
            f"model ({self.trained_size:,} of {self.anatomy.size:,})"
        )


def select(anatomy: Anatomy, config: SelectionConfig) -> Selection:
    """Make the selection of one round.

    Raises:
        HFTError: a `freeze` pattern of the explicit policy matches no unit.
    """
    policies: dict[str, Callable[[Anatomy, SelectionConfig], Iterable[Unit]]] = {
        "category": _category,
        "layer": _layer,
        "model": _model,
        "explicit": _explicit,
        "all": lambda anatomy, config: anatomy.units,
    }
    return Selection(anatomy, config, frozenset(unit.name for unit in policies[config.policy](anatomy, config)))


def draw(names: Iterable[str], count: int, *key: object) -> list[str]:
    """Draw `count` of `names` without replacement, uniformly, as a pure function of the names and the key.

    The names with the smallest SHA-256 of key and name are drawn. Unlike `random.sample` this hangs on neither the
    order of the names nor the Python version.
    """
    prefix = "/".join(map(str, key))
    return sorted(names, key=lambda name: hashlib.sha256(f"{prefix}/{name}".encode()).digest())[:count]


def pools(anatomy: Anatomy, layer: int) -> dict[str, list[Unit]]:
    """The sets of like units of one layer that the category policy draws from.

    Attention is one pool; with grouped queries it is two, {q, o} and {k, v}, whose members have the same shape, so
    that half of the units is half of the scalars (A.4.12; A.4.1 says the same in other groups). Norms of queries and
    keys, which are as long as a head, are kept apart from the norms of the hidden state.
    """
    found: dict[str, list[Unit]] = {}
    for unit in anatomy.layer(layer):
        pool = unit.block
        if unit.block == "attention" and anatomy.grouped_query:
            pool += ".kv" if unit.kind in ("k_proj", "v_proj") else ".qo"
        elif unit.kind in ("q_norm", "k_norm"):
            pool += ".qk"
        found.setdefault(pool, []).append(unit)
    return found


def _category(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """Algorithm 1: of each block in each layer a random fraction trains.

    A fraction that is not whole in a layer is met over the layers: half of three MLP matrices is one in half of the
    layers and two in the others, and the seed draws which.
    """
    key = ("category", config.selection_seed, config.round)
    layers = [pools(anatomy, layer) for layer in range(anatomy.num_layers)]
    trained = []
    for pool in layers[0]:
        block_fraction = getattr(config, f"{pool.partition('.')[0]}_fraction")
        fraction = config.fraction if block_fraction is None else block_fraction
        units = [layer[pool] for layer in layers]
        counts = _spread(round(fraction * sum(map(len, units))), units, (*key, pool))
        for members, count in zip(units, counts, strict=True):
            drawn = draw((unit.name for unit in members), count, *key)
            trained += [unit for unit in members if unit.name in drawn]
    return trained


def _spread(total: int, units: Sequence[Sequence[Unit]], key: tuple) -> list[int]:
    whole, left_over = divmod(total, len(units))
    one_more = draw(map(str, range(len(units))), left_over, *key, "layers that round up")
    return [whole + (str(layer) in one_more) for layer in range(len(units))]


def _layer(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """Layer-level selection (section 4.3): evenly spaced whole layers, every other one at one half."""
    total, count = round(config.fraction * anatomy.num_layers), anatomy.num_layers
    offset = int(draw(map(str, range(count)), 1, "layer", config.selection_seed, config.round)[0])
    trained = {layer for layer in range(count) if (layer + offset) * total % count < total}
    return [unit for unit in anatomy.units if unit.layer in trained]


def _model(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """Model-level selection (section 4.3): a fraction of all units, so of the scalars only about that fraction."""
    count = round(config.fraction * len(anatomy.units))
    drawn = set(draw((u.name for u in anatomy.units), count, "model", config.selection_seed, config.round))
    return [unit for unit in anatomy.units if unit.name in drawn]


def _explicit(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """All units but those a pattern names, by kind or whole name (Table 23 freezes q and k, or o and v)."""

    def matches(unit: Unit, pattern: str) -> bool:
        return fnmatchcase(unit.name, pattern) or fnmatchcase(unit.kind, pattern)

    for pattern in config.freeze or ():
        if not any(matches(unit, pattern) for unit in anatomy.units):
            kinds = ", ".join(dict.fromkeys(unit.kind for unit in anatomy.units))
            raise HFTError(f"freeze: no unit matches {pattern!r}; the kinds here are {kinds}")
    return [unit for unit in anatomy.units if not any(matches(unit, pattern) for pattern in config.freeze or ())]


def describe_difference(ours: SelectionConfig, theirs: SelectionConfig) -> str:
    """The fields in which two configs differ, as `name a there, b here`."""
    pairs = ((f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(SelectionConfig))
    return ", ".join(f"{name} {there} there, {here} here" for name, there, here in pairs if there != here)
