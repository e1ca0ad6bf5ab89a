"""Rules that make a selection. Pure: the same anatomy and config give the same selection on any machine."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hft.errors import HFTError
from hft.model.anatomy import BLOCKS, Anatomy, Part, Unit
from hft.selection.masks import Mask, Masks
from hft.userfile import load_from_file

POLICIES = {
    "category": "a fraction of each block of each layer trains (the paper's HFT, Algorithm 1)",
    "layer": "every other layer trains as a whole",
    "model": "half of all matrices train, anywhere in the model",
    "explicit": "all but the units that match `freeze` train",
    "all": "everything trains (FFT)",
    "random-element": "random elements of every matrix train",
    "importance": "what matters least to the base on a sample of text trains",
    "core": "all but the elements that moved furthest on given tasks train (CPI-FT)",
}
GRANULARITIES = ("unit", "column", "element")
SCORES = ("magnitude", "wanda", "fisher")


@dataclass
class SelectionConfig:
    """Which units train in a round, as a method YAML or the command line gives it."""

    policy: str = field(
        default="category",
        metadata={
            "help": "; ".join(f"{name}: {what}" for name, what in POLICIES.items()) + "; FILE.py:FUNCTION: your own."
        },
    )
    fraction: float = field(
        default=0.5,
        metadata={
            "help": "Fraction that trains (in a reset: stays tuned), of each block's units, of the layers or of all "
            "units."
        },
    )
    attention_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the attention units, where it differs (category policy)."}
    )
    mlp_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the MLP units, where it differs (category policy)."}
    )
    experts_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the experts' matrices, where it differs (category policy)."}
    )
    norm_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the norms, where it differs (category policy)."}
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Unit names or kinds to freeze, with * and ?, e.g. q_proj k_proj: only these (explicit policy), or "
            "first among the units that are drawn to freeze (category policy)."
        },
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Freeze the embeddings and the head too (Tables 6 and 7)."}
    )
    freeze_router: bool = field(
        default=False, metadata={"help": "Freeze the routers of a mixture of experts; else all of them train."}
    )
    granularity: str | None = field(
        default=None,
        metadata={"help": f"What the importance policy freezes as a whole: {', '.join(GRANULARITIES)}."},
    )
    score: str | None = field(
        default=None, metadata={"help": f"What the importance policy goes by: {', '.join(SCORES)}."}
    )
    invert: bool = field(
        default=False, metadata={"help": "Freeze what matters least instead of most (importance policy)."}
    )
    importance_data: str | None = field(
        default=None,
        metadata={"help": "General text that the importance policy scores the base on; given as dataset_name is."},
    )
    importance_rows: int | None = field(default=None, metadata={"help": "Rows of it that are used."})
    cores: list[str] | None = field(
        default=None,
        metadata={"help": "Folders of cores, as `hft cpi probe` makes them, whose elements to freeze (core policy)."},
    )
    train_core: bool | None = field(
        default=None, metadata={"help": "Train only the elements of the cores, and freeze all others (core policy)."}
    )
    policy_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of your own policy, by name."}
    )
    selection_seed: int = field(default=0, metadata={"help": "Seed of the selection, apart from the training seed."})
    round: int = field(default=1, metadata={"help": "Number of this run in a sequence; each draws another half."})

    def __post_init__(self):
        if self.policy not in POLICIES and ":" not in self.policy:
            near = difflib.get_close_matches(self.policy, POLICIES, n=1) or [", ".join(POLICIES)]
            raise HFTError(
                f"unknown policy {self.policy!r}, did you mean {near[0]}? One of your own is FILE.py:FUNCTION"
            )
        for name in ("fraction", *FRACTIONS.values()):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise HFTError(f"{name} must lie in 0..1, got {value}")
        for policy, names in OWN_KEYS.items():
            for name in names:
                value = getattr(self, name)
                if self.policy != policy and value is not None and value is not False:
                    raise HFTError(f"{name} belongs to the {policy} policy, not to {self.policy!r}; remove it")
        if (self.policy == "explicit" and not self.freeze) or (
            self.freeze and self.policy not in ("explicit", "category")
        ):
            raise HFTError("the explicit policy needs `freeze`, and only it and the category policy take it")
        if self.policy_options and ":" not in self.policy:
            raise HFTError("policy_options are for a policy of your own, policy: FILE.py:FUNCTION")
        if self.policy == "importance" and (self.granularity not in GRANULARITIES or self.score not in SCORES):
            raise HFTError(
                f"the importance policy needs a granularity ({', '.join(GRANULARITIES)}) and a score "
                f"({', '.join(SCORES)})"
            )
        if self.policy in ("all", "explicit", "core") and self.fraction != 0.5:
            raise HFTError(f"fraction means nothing to the {self.policy} policy; remove it")
        if self.round < 1:
            raise HFTError(f"round counts from 1, got {self.round}")


FRACTIONS = {block: f"{block}_fraction" for block in BLOCKS if block != "router"}
# Keys that mean something to one policy only.
OWN_KEYS = {
    "category": tuple(FRACTIONS.values()),
    "importance": ("granularity", "score", "invert", "importance_data", "importance_rows"),
    "core": ("cores", "train_core"),
}

# Policies that choose among billions of elements, or look at the base's weights: only once a run is sure to start.
DEFERRED = ("random-element", "importance")

# Policies that may freeze some elements of a unit and train the others.
IN_PART = (*DEFERRED, "core")

# Policies that another seed makes another selection of.
DRAWN = ("category", "layer", "model", "random-element")

# What a policy returns: the units that train, and for some parameters which elements, True where they train.
Choice = Iterable[Unit] | tuple[Iterable[Unit], Mapping[str, torch.Tensor | Mask]]


@dataclass(frozen=True)
class Selection:
    """Which units train in this round, by name, and the anatomy and config it was made from.

    Attributes:
        trained_units: names of the units that train, wholly or in part.
        trained_masks: of parameters that train in part by the policy's choice, which elements do; also of embeddings,
            head and final norm. Parameters that several units share need no entry here.
    """

    anatomy: Anatomy
    config: SelectionConfig
    trained_units: frozenset[str]
    trained_masks: Mapping[str, Mask] = field(default_factory=dict)

    def trains(self, unit: Unit) -> bool:
        return unit.name in self.trained_units

    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it: the config, with seed and round."""
        return asdict(self.config)

    def trained_fraction(self, unit: Unit) -> float:
        """Trained elements of a unit / all of its elements."""
        if not self.trains(unit) or not self.trained_masks.keys() & set(unit.parameters):
            return float(self.trains(unit))
        trained = 0
        for part in unit.parts:
            frozen = self.frozen_masks.get(part.parameter)
            inside = torch.zeros(part.shape, dtype=torch.bool)
            part.mark(inside, True)
            trained += (inside & ~frozen.tensor() if frozen else inside).sum().item()
        return trained / unit.numel

    @functools.cached_property
    def _trained_of(self) -> dict[str, list[tuple[Part, bool]]]:
        """Of each parameter in the layers, its parts and whether they train."""
        parts = self.anatomy.parts_by_parameter.items()
        return {name: [(part, self.trains(unit)) for unit, part in found] for name, found in parts}

    @property
    def frozen_parameters(self) -> list[str]:
        """Names of the wholly frozen parameters, in model order, then those outside the layers."""
        frozen = [name for name, parts in self._trained_of.items() if not any(trains for _, trains in parts)]
        return (
            frozen
            + (list(self.anatomy.embeddings) if self.config.freeze_embeddings else [])
            + list(self.anatomy.towers)
        )

    @property
    def trained_parameters(self) -> list[str]:
        """Names of the parameters that train, wholly or in part, in model order, then those outside the layers."""
        anatomy = self.anatomy
        trained = [name for name, parts in self._trained_of.items() if any(trains for _, trains in parts)]
        return trained + ([] if self.config.freeze_embeddings else list(anatomy.embeddings)) + list(anatomy.others)

    @functools.cached_property
    def frozen_masks(self) -> dict[str, Mask]:
        """Of each partly frozen parameter, which elements are frozen; a mask broadcasts to its parameter."""
        masks = {}
        for name, parts in self._trained_of.items():
            chosen = self.trained_masks.get(name)
            if len({trains for _, trains in parts}) == 1 and (chosen is None or not parts[0][1]):
                continue
            shape = parts[0][0].shape
            cut = max((len(box) for part, _ in parts for box in part.boxes), default=0)
            frozen = torch.zeros(*shape[:cut], *[1] * (len(shape) - cut), dtype=torch.bool)
            for part, trains in parts:
                part.mark(frozen, not trains)
            if chosen is not None:
                frozen = frozen | ~chosen.tensor()
            masks[name] = Mask.of(frozen)
        outside = self.anatomy.others | ({} if self.config.freeze_embeddings else self.anatomy.embeddings)
        return masks | {name: ~self.trained_masks[name] for name in outside if name in self.trained_masks}

    @functools.cached_property
    def num_trained_in_layers(self) -> int:
        """Trained parameters in the layers."""
        whole = sum(p.numel for parts in self._trained_of.values() for p, trains in parts if trains)
        for name in self.trained_masks.keys() & self.frozen_masks.keys() & self._trained_of.keys():
            parts = self._trained_of[name]
            mask, shape = self.frozen_masks[name], parts[0][0].shape
            trained = (~mask.tensor()).sum().item() * (math.prod(shape) // math.prod(mask.shape))
            whole += trained - sum(part.numel for part, trains in parts if trains)
        return whole

    @functools.cached_property
    def num_trained(self) -> int:
        """Trained parameters in the whole model."""
        outside = (mask for name, mask in self.frozen_masks.items() if name not in self.anatomy.in_layers)
        return self.num_trained_in_layers + self._trained_outside - sum(mask.count() for mask in outside)

    @property
    def num_with_optimizer_state(self) -> int:
        """Parameters with an fp32 master, a gradient and optimizer state: partly frozen ones have them whole."""
        trained = (parts[0][0].shape for parts in self._trained_of.values() if any(trains for _, trains in parts))
        return sum(map(math.prod, trained)) + self._trained_outside

    @property
    def _trained_outside(self) -> int:
        embeddings = 0 if self.config.freeze_embeddings else sum(self.anatomy.embeddings.values())
        return sum(self.anatomy.others.values()) + embeddings

    @property
    def fraction_of_layers(self) -> float:
        """The paper's ratio: trained parameters / parameters in the layers."""
        return self.num_trained_in_layers / self.anatomy.numel_in_layers

    @property
    def fraction_of_model(self) -> float:
        """Trained parameters / all parameters."""
        return self.num_trained / self.anatomy.numel

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each block, how many of its units train, wholly or in part, and how many there are."""
        return {
            block: (sum(map(self.trains, units)), len(units))
            for block in BLOCKS
            if (units := [unit for unit in self.anatomy.units if unit.block == block])
        }

    def summary(self) -> str:
        """A few lines for people: the policy, what trains of each block, and the two fractions."""
        c = self.config
        counts = ", ".join(f"{block} {trained}/{total}" for block, (trained, total) in self.counts().items())
        ends = "frozen" if c.freeze_embeddings else "train"
        parts = f"{len(self.frozen_masks)} tensors train in part\n" if self.frozen_masks else ""
        return (
            f"{c.policy} policy, seed {c.selection_seed}, round {c.round}: {counts} units train; embeddings and head "
            f"{ends}\n{parts}trainable fraction {self.fraction_of_layers:.1%} of the layers "
            f"({self.num_trained_in_layers:,} of {self.anatomy.numel_in_layers:,}), {self.fraction_of_model:.1%} of the"
            f" whole model ({self.num_trained:,} of {self.anatomy.numel:,})"
        )


def select(anatomy: Anatomy, config: SelectionConfig) -> Selection:
    """Make the selection of one round.

    Raises:
        HFTError: a `freeze` pattern of the explicit policy matches no unit; your own policy cannot be loaded or
            returns something else; or the policy needs the base's weights (`hft.selection.importance`).
    """
    policies: dict[str, Callable[[Anatomy, SelectionConfig], Choice]] = {
        "category": category,
        "layer": _layer,
        "model": _model,
        "explicit": _explicit,
        "all": lambda anatomy, config: anatomy.units,
        "random-element": _random_element,
        "core": _core,
    }
    if config.policy == "importance":
        raise HFTError("the importance policy looks at the base's weights, so only a training run can take it")
    return build_selection(anatomy, config, (policies.get(config.policy) or _load(config.policy))(anatomy, config))


def build_selection(anatomy: Anatomy, config: SelectionConfig, choice: Choice) -> Selection:
    """The selection that a policy's choice amounts to.

    Raises:
        HFTError: the choice names something that the model does not have.
    """
    units, masks = choice if isinstance(choice, tuple) and isinstance(choice[-1], Mapping) else (choice, {})
    known = {unit.name: unit for unit in anatomy.units}
    shapes, outside = anatomy.shapes, anatomy.embeddings | anatomy.others
    try:
        trained = frozenset(unit.name for unit in units)
    except (TypeError, AttributeError) as error:
        raise HFTError(f"policy {config.policy} must return units of the anatomy: {error}") from error
    if strange := [*(trained - known.keys()), *(masks.keys() - shapes.keys() - outside.keys())]:
        raise HFTError(f"policy {config.policy} chose {strange[0]}, which the model does not have")
    masks = {name: mask if isinstance(mask, Mask) else _packed(config, name, mask) for name, mask in masks.items()}
    for name, mask in masks.items():
        if name in outside and math.prod(mask.shape) != outside[name]:
            raise HFTError(f"policy {config.policy} gives {name} a mask of {mask.shape}, not one of its own shape")
        if name in shapes and (
            len(mask.shape) != len(shapes[name])
            or any(m not in (1, s) for m, s in zip(mask.shape, shapes[name], strict=True))
        ):
            raise HFTError(
                f"policy {config.policy} gives {name}, of shape {shapes[name]}, a mask of shape {mask.shape}; each "
                "dimension must be as long or 1"
            )
    routers = {unit.name for unit in anatomy.units if unit.block == "router"}
    if config.freeze_router:
        trained -= routers
    elif config.policy in ("layer", "model"):
        trained |= routers
    return Selection(anatomy, config, trained, masks)


def _packed(config: SelectionConfig, name: str, mask: object) -> Mask:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise HFTError(f"policy {config.policy} must give a bool tensor for {name}, True where it trains; got {kind}")
    return Mask.of(mask)


def placeholder_selection(anatomy: Anatomy, config: SelectionConfig) -> Selection:
    """The selection as far as it is known before the base is loaded: its counts and fractions will hold.

    For policies that choose elements or look at weights it is a placeholder of the same budget.
    """
    if config.policy not in DEFERRED:
        return select(anatomy, config)
    if config.granularity == "unit":
        return build_selection(anatomy, config, category(anatomy, config))
    masks = {}
    for part in (part for unit in anatomy.units for part in unit.parts if len(part.shape) > 1):
        columns = part.shape[-1]
        trained = torch.arange(columns) < round(config.fraction * columns)
        masks[part.parameter] = trained.view(*[1] * (len(part.shape) - 1), columns)
    units = anatomy.units if config.policy == "random-element" else half_of_the_norms(anatomy, config)
    return build_selection(anatomy, config, (units, masks))


def half_of_the_norms(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """All units but the norms that the category policy would freeze."""
    norms = {unit.name for unit in category(anatomy, config) if unit.block == "norm"}
    return [unit for unit in anatomy.units if unit.block != "norm" or unit.name in norms]


def _load(policy: str) -> Callable[[Anatomy, SelectionConfig], Choice]:
    """A policy of the user's own, `FILE.py:FUNCTION`, with `policy_options` as its further arguments."""
    path, _, name = policy.rpartition(":")
    if not callable(function := load_from_file(policy, "policy")):
        raise HFTError(f"policy {policy}: {path} has no function {name}")

    def choose(anatomy: Anatomy, config: SelectionConfig) -> Choice:
        options = config.policy_options or {}
        try:
            inspect.signature(function).bind(anatomy, config, **options)
        except TypeError as error:
            raise HFTError(f"policy {policy}: policy_options do not fit {name}: {error}") from error
        return function(anatomy, config, **options)

    return choose


def sample_names(names: Iterable[str], count: int, *key: object) -> list[str]:
    """Draw `count` of `names` without replacement, uniformly, as a pure function of the names and the key.

    The names with the smallest SHA-256 of key and name are drawn. Unlike `random.sample` this depends on neither the
    order of the names nor the Python version.
    """
    prefix = "/".join(map(str, key))
    return sorted(names, key=lambda name: hashlib.sha256(f"{prefix}/{name}".encode()).digest())[:count]


def pools(anatomy: Anatomy, layer: int) -> dict[str, list[Unit]]:
    """The sets of like units of one layer that the category policy draws from.

    Attention is one pool; with grouped queries it is two, {q, o} and {k, v}, whose members have the same shape, so
    that half of the units is half of the parameters (A.4.12; A.4.1 groups them otherwise). Norms of queries and
    keys, which are as long as a head, are kept apart from the norms of the hidden state. The matrices of all experts
    of a layer are one pool, apart from an MLP that every token takes.
    """
    grouped = anatomy.grouped_query
    found: dict[str, list[Unit]] = {}
    for unit in anatomy.layer(layer):
        pool = unit.block
        if unit.block == "attention" and grouped:
            pool += ".kv" if unit.kind in ("k_proj", "v_proj") else ".qo"
        elif unit.kind in ("q_norm", "k_norm"):
            pool += ".qk"
        found.setdefault(pool, []).append(unit)
    return found


def category(anatomy: Anatomy, config: SelectionConfig, importance: Mapping[str, float] | None = None) -> list[Unit]:
    """Algorithm 1: of each block in each layer a random fraction trains.

    A fraction that is not a whole number of units in a layer is met over the layers: half of three MLP matrices is one
    in half of the layers and two in the others, and the seed draws which. The paper leaves mixtures of experts open
    (Limitations). Here half of a layer's expert matrices train, drawn among all of its experts, so that half of every
    layer stays as in a dense model whichever experts a token is sent to; routers train, since they are a small part of
    the layer and have to follow experts that change.

    Args:
        anatomy: of the model.
        config: fractions, seed and round.
        importance: by unit name. Where every unit of a pool has one, the least important ones train.
    """
    key = ("category", config.selection_seed, config.round)
    frozen_first = {unit.name for unit in _named(anatomy, config.freeze or ())}
    layers = [pools(anatomy, layer) for layer in range(anatomy.num_layers)]
    trained = []
    # Layers need not be alike (DeepSeek's first ones have no experts): those of one kind are rounded together.
    alike: dict[tuple[str, int], list[list[Unit]]] = {}
    for layer in layers:
        for pool, units in layer.items():
            alike.setdefault((pool, len(units)), []).append(units)
    for (pool, _), units in alike.items():
        block = pool.partition(".")[0]
        block_fraction = 1.0 if block == "router" else getattr(config, FRACTIONS[block])
        fraction = config.fraction if block_fraction is None else block_fraction
        counts = _spread(round(fraction * sum(map(len, units))), units, (*key, pool))
        for members, count in zip(units, counts, strict=True):
            names = sample_names((unit.name for unit in members), len(members), *key)
            if importance is not None and all(name in importance for name in names):
                names.sort(key=importance.get)
            drawn = set(sorted(names, key=frozen_first.__contains__)[:count])
            trained += [unit for unit in members if unit.name in drawn]
    if left := [unit.name for unit in trained if unit.name in frozen_first]:
        routers = any(unit.name == left[0] and unit.block == "router" for unit in trained)
        hint = "freeze_router freezes routers" if routers else "lower the fraction, or take the explicit policy"
        raise HFTError(f"freeze names {left[0]}, but more is named there than its fraction leaves frozen; {hint}")
    return trained


def _spread(total: int, units: Sequence[Sequence[Unit]], key: tuple) -> list[int]:
    whole, left_over = divmod(total, len(units))
    one_more = sample_names(map(str, range(len(units))), left_over, *key, "layers that round up")
    return [whole + (str(layer) in one_more) for layer in range(len(units))]


def _layer(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """Layer-level selection (section 4.3): evenly spaced whole layers, every other one at one half."""
    total, count = round(config.fraction * anatomy.num_layers), anatomy.num_layers
    offset = int(sample_names(map(str, range(count)), 1, "layer", config.selection_seed, config.round)[0])
    trained = {layer for layer in range(count) if (layer + offset) * total % count < total}
    return [unit for unit in anatomy.units if unit.layer in trained]


def _model(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """Model-level selection (section 4.3): a fraction of all matrices, so of the parameters only about that fraction.

    Norms, which are not matrices, are drawn as in the category policy.
    """
    matrices = [unit.name for unit in anatomy.units if unit.block not in ("norm", "router")]
    count = round(config.fraction * len(matrices))
    drawn = set(sample_names(matrices, count, "model", config.selection_seed, config.round))
    return [unit for unit in half_of_the_norms(anatomy, config) if unit.block == "norm" or unit.name in drawn]


def _explicit(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """All units but those a pattern names."""
    frozen = {unit.name for unit in _named(anatomy, config.freeze or ())}
    return [unit for unit in anatomy.units if unit.name not in frozen]


def _named(anatomy: Anatomy, patterns: Iterable[str]) -> list[Unit]:
    """The units whose kind or whole name matches a pattern."""
    found = []
    for pattern in patterns:
        matching = [u for u in anatomy.units if fnmatchcase(u.name, pattern) or fnmatchcase(u.kind, pattern)]
        if not matching:
            kinds = ", ".join(dict.fromkeys(unit.kind for unit in anatomy.units))
            raise HFTError(f"freeze: no unit matches {pattern!r}; the kinds here are {kinds}")
        found += matching
    return found


def _random_element(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """Random elements of every matrix train, at the budget that whole matrices would have (SpaRTA, 2502.15975).

    Of each matrix exactly that fraction, rounded. Biases and norms, a small part, train whole.
    """
    shapes = {name: shape for name, shape in anatomy.shapes.items() if len(shape) > 1}
    masks = {}
    for name, shape in tqdm(shapes.items(), desc="drawing elements", unit="tensor", leave=False):
        size = math.prod(shape)
        key = f"random-element/{config.selection_seed}/{config.round}/{name}"
        # The raw stream of a counter-based generator is the same in every version of numpy and on every machine.
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        numbers = np.random.Philox(key=seed).random_raw(size)
        trained = np.zeros(size, dtype=bool)
        count = round(config.fraction * size)
        trained[np.argpartition(numbers, count - 1)[:count] if count else []] = True
        masks[name] = Mask.of(torch.from_numpy(trained).view(shape))
    return anatomy.units, masks


def _core(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """All elements but those of the cores train (CPI-FT, 2508.21741, stage 4); or only they do (LoTA, 2406.16797)."""
    core = union_of_cores(config.cores or ())
    numels = {name: math.prod(shape) for name, shape in anatomy.shapes.items()}
    numels |= anatomy.embeddings | anatomy.others | anatomy.towers
    if wrong := [name for name, size in numels.items() if name not in core or math.prod(core[name].shape) != size]:
        raise HFTError(f"core {config.cores[0]} is of another model: it has no {wrong[0]} of that size")
    core = {name: mask for name, mask in core.items() if name not in anatomy.towers}
    holding = {name for name, mask in core.items() if mask.bits.any()}
    if not config.train_core:
        return anatomy.units, {name: ~core[name] for name in holding}
    # A unit without an element of the core is frozen as a whole, without master weights.
    return [unit for unit in anatomy.units if holding & set(unit.parameters)], core


def union_of_cores(folders: Sequence[str]) -> dict[str, Mask]:
    """The elements that are in at least one of some cores, by parameter.

    Raises:
        HFTError: there are none, one is missing, or they are of different models.
    """
    if not folders:
        raise HFTError("the core policy needs --cores FOLDER [FOLDER ...], which `hft cpi probe` makes")
    union: dict[str, Mask] = {}
    for folder in folders:
        core = Masks(folder)
        if union and core.shapes != {name: mask.shape for name, mask in union.items()}:
            raise HFTError(f"cores {folders[0]} and {folder} are of different models")
        union = {name: union[name] | mask if union else mask for name, mask in core.items()}
    return union
