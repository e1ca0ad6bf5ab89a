"""Which units train in a round: the config that asks for them, and the selection that names them."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from hft.config import Fraction, check_types, option
from hft.errors import HFTError, did_you_mean
from hft.model.anatomy import BLOCKS, Anatomy, Unit
from hft.selection.masks import Mask
from hft.userfile import with_files

POLICIES = {
    "category": "a fraction of each block of each layer trains (the paper's HFT, Algorithm 1)",
    "layer": "every other layer trains as a whole",
    "model": "half of all matrices train, anywhere in the model",
    "bottom": "the upper layers train, and the lower ones and the input embeddings are frozen",
    "explicit": "all but the units that match `freeze` train",
    "all": "everything trains (FFT)",
    "random-element": "random elements of every matrix train",
    "importance": "what matters least to the base, by its weights or on a sample of text, trains",
    "core": "all but the elements that moved furthest on given tasks train (CPI-FT)",
}
READ_TEXT = ("wanda", "fisher")


@dataclass
class SelectionConfig:
    """Which units train in a round, as a method YAML or the command line gives it."""

    policy: str = option("; ".join([*map(": ".join, POLICIES.items()), "FILE.py:FUNCTION: your own."]), "category")
    fraction: Fraction = option(
        "Fraction that trains of each block's units, of layers or of all units (reset: that stays tuned).", 0.5
    )
    attention_fraction: Fraction | None = option("Fraction of attention units, if different (category policy).")
    mlp_fraction: Fraction | None = option("Fraction of MLP units, if different (category policy).")
    experts_fraction: Fraction | None = option("Fraction of expert matrices, if different (category policy).")
    norm_fraction: Fraction | None = option("Fraction of norms, where it differs (category policy).")
    freeze: list[str] | None = option(
        "Names, kinds or layers of units to freeze, with * and ?, e.g. q_proj k_proj, or 0-15: only these (explicit "
        "policy), or these before others (category policy)."
    )
    train: list[str] | None = option(
        "Names, kinds or layers of what trains, e.g. 16-31 lm_head: nothing else, embeddings, head and final norm "
        "included (explicit policy)."
    )
    freeze_embeddings: bool = option("Freeze the embeddings and the head too (Tables 6 and 7).", False)
    freeze_router: bool = option("Freeze the routers of a mixture of experts; otherwise all of them train.", False)
    importance: str | None = option(
        "Folder that `hft importance` wrote, or a file of Spectrum's (snr_results_*.json); by default the "
        "run scores its base first (importance policy)."
    )
    granularity: Literal["unit", "column", "element"] | None = option("What importance freezes as a whole.")
    score: Literal["magnitude", "wanda", "fisher", "snr"] | None = option(
        "What importance scores by (snr, Spectrum: of the matrices of each type those with the highest "
        "signal-to-noise ratio train, and nothing else in the layers)."
    )
    invert: bool = option("The other way around (importance policy).", False)
    importance_data: str | None = option(f"Text that {' and '.join(READ_TEXT)} score on; given as dataset_name is.")
    importance_rows: PositiveInt | None = option("Rows of it to use.")
    cores: list[str] | None = option("Folders that `hft cpi probe` wrote; their cores are frozen (core policy).")
    train_core: bool | None = option("Train only the elements of the cores, and freeze all others (core policy).")
    policy_options: dict[str, Any] | None = option("Arguments of your own policy, by name.")
    selection_seed: int = option("Seed of the selection, independent of the training seed.", 0)
    round: PositiveInt = option("Number of this run in a sequence; each draws another half.", 1)

    def __post_init__(self):
        check_types(self)
        if self.policy not in POLICIES and ":" not in self.policy:
            hint = did_you_mean(self.policy, POLICIES, f", there are {', '.join(POLICIES)}, or FILE.py:FUNCTION")
            raise HFTError(f"unknown policy {self.policy!r}{hint}")
        for policy, names in OWN_KEYS.items():
            for name in names:
                value = getattr(self, name)
                if self.policy != policy and value is not None and value is not False:
                    raise HFTError(f"{name} belongs to the {policy} policy, not to {self.policy!r}; remove it")
        needs_freeze, takes_freeze = self.policy == "explicit", self.policy in ("explicit", "category")
        if (needs_freeze and not (self.freeze or self.train)) or (self.freeze and not takes_freeze):
            raise HFTError("the explicit policy needs `freeze` or `train`; the category policy takes `freeze` too")
        if self.train and (self.freeze or self.freeze_embeddings):
            raise HFTError("train names all that trains; remove freeze and freeze_embeddings, or train")
        if self.policy_options and ":" not in self.policy:
            raise HFTError("policy_options are for a policy of your own, policy: FILE.py:FUNCTION")
        # A folder of scores says how it was made.
        if self.policy == "importance" and not (self.importance or (self.granularity and self.score)):
            raise HFTError("the importance policy needs a granularity and a score; give --granularity and --score")
        if self.score == "snr" and self.granularity not in (None, "unit"):
            raise HFTError("snr scores whole matrices; give --granularity unit")
        if self.policy in ("all", "explicit", "core") and self.fraction != 0.5:
            raise HFTError(f"fraction means nothing to the {self.policy} policy; remove it")


FRACTIONS = {block: f"{block}_fraction" for block in BLOCKS if block != "router"}
# Keys that mean something to one policy only.
OWN_KEYS = {
    "explicit": ("train",),
    "category": tuple(FRACTIONS.values()),
    "importance": ("importance", "granularity", "score", "invert", "importance_data", "importance_rows"),
    "core": ("cores", "train_core"),
}
# Policies that may freeze some elements of a unit and train the others.
ELEMENTWISE = ("random-element", "importance", "core")
# Policies that another seed makes another selection of.
DRAWN = ("category", "layer", "model", "random-element")

# What a policy returns: the units that train, and for some parameters which elements, True where they train.
# Embeddings, head and final norm train whatever it returns; None freezes one.
Choice = Iterable[Unit] | tuple[Iterable[Unit], Mapping[str, torch.Tensor | Mask | None]]


@dataclass(frozen=True)
class Selection:
    """Which units train in this round, by name, and the anatomy and config it was made from.

    Attributes:
        trained_units: names of the units that train, wholly or in part.
        trained_masks: for parameters that the policy trains in part, which elements train; also for embeddings, head
            and final norm. Parameters that several units share need no entry.
        frozen_outside: parameters outside the layers that the policy freezes whole.
    """

    anatomy: Anatomy
    config: SelectionConfig
    trained_units: frozenset[str]
    trained_masks: Mapping[str, Mask] = field(default_factory=dict)
    frozen_outside: frozenset[str] = frozenset()

    def trains(self, unit: Unit) -> bool:
        """Whether a unit trains, wholly or in part."""
        return unit.name in self.trained_units

    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return with_files(asdict(self.config))

    def trained_fraction(self, unit: Unit) -> float:
        """Trained elements of a unit / all of its elements."""
        if not self.trains(unit) or not self.trained_masks.keys() & set(unit.parameters):
            return float(self.trains(unit))
        trained = 0
        for part in unit.parts:
            inside = torch.zeros(part.shape, dtype=torch.bool)
            part.mark(inside, True)
            frozen = self.frozen_masks.get(part.parameter)
            trained += (inside & ~frozen.tensor() if frozen else inside).sum().item()
        return trained / unit.numel

    @functools.cached_property
    def frozen_parameters(self) -> list[str]:
        """Names of the wholly frozen parameters, in model order, then those outside the layers."""
        outside = self.frozen_outside | self.anatomy.towers.keys()
        outside |= self.anatomy.embeddings.keys() if self.config.freeze_embeddings else set()
        parts = self.anatomy.parts_by_parameter
        frozen = [name for name, found in parts.items() if not any(self.trains(unit) for unit, _ in found)]
        return frozen + [name for name in self.anatomy.outside_layers if name in outside]

    @functools.cached_property
    def trained_parameters(self) -> list[str]:
        """Names of the parameters that train, wholly or in part, in model order, then those outside the layers."""
        frozen = set(self.frozen_parameters)
        return [name for name in self.anatomy.numels if name not in frozen]

    @functools.cached_property
    def frozen_masks(self) -> dict[str, Mask]:
        """Of each partly frozen parameter, which elements are frozen; a mask broadcasts to its parameter."""
        masks = {}
        for name, parts in self.anatomy.parts_by_parameter.items():
            chosen, trains = self.trained_masks.get(name), [self.trains(unit) for unit, _ in parts]
            if all(trains) and chosen is not None:
                masks[name] = ~chosen
            elif any(trains) and not all(trains):
                shape = parts[0][1].shape
                cut = max((len(box) for _, part in parts for box in part.boxes), default=0)
                frozen = torch.zeros(*shape[:cut], *[1] * (len(shape) - cut), dtype=torch.bool)
                for unit, part in parts:
                    part.mark(frozen, not self.trains(unit))
                masks[name] = Mask.of(frozen | (~chosen.tensor() if chosen is not None else False))
        outside = self.anatomy.outside_layers & self.trained_masks.keys()
        return masks | {name: ~self.trained_masks[name] for name in self.trained_parameters if name in outside}

    @functools.cached_property
    def num_trained_in_layers(self) -> int:
        return sum(self.num_trained_of(name) for name in self.trained_parameters if name in self.anatomy.shapes)

    @functools.cached_property
    def num_trained(self) -> int:
        return sum(map(self.num_trained_of, self.trained_parameters))

    def num_trained_of(self, name: str) -> int:
        """Trained elements of a parameter that trains, wholly or in part."""
        size, mask = self.anatomy.numels[name], self.frozen_masks.get(name)
        return size if mask is None else size - mask.count() * (size // mask.numel)

    @property
    def fraction_of_layers(self) -> float:
        """The paper's ratio: trained parameters / parameters in the layers."""
        return self.num_trained_in_layers / self.anatomy.numel_in_layers

    @property
    def fraction_of_model(self) -> float:
        return self.num_trained / self.anatomy.numel

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each block, how many of its units train, wholly or in part, and how many there are."""
        return {
            block: (sum(map(self.trains, units)), len(units))
            for block in BLOCKS
            if (units := [unit for unit in self.anatomy.units if unit.block == block])
        }

    def summary(self) -> str:
        """A few lines of text: the policy, how many units of each block train, and the two fractions."""
        c = self.config
        counts = ", ".join(f"{block} {trained}/{total}" for block, (trained, total) in self.counts().items())
        ends, held = "train", self.anatomy.embeddings.keys() & self.frozen_parameters
        if held:
            ends = "frozen" if held == self.anatomy.embeddings.keys() else f"train but {', '.join(held)}"
        parts = f"{len(self.frozen_masks)} tensors train in part\n" if self.frozen_masks else ""
        return (
            f"{c.policy} policy, seed {c.selection_seed}, round {c.round}: {counts} units train; embeddings and head "
            f"{ends}\n{parts}trainable fraction {self.fraction_of_layers:.1%} of the layers "
            f"({self.num_trained_in_layers:,} of {self.anatomy.numel_in_layers:,}), {self.fraction_of_model:.1%} of the"
            f" whole model ({self.num_trained:,} of {self.anatomy.numel:,})"
        )
