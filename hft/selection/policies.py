"""Rules that make a selection. Pure: the same anatomy and config give the same selection on any machine."""

import functools
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import numpy as np
import torch

from hft.errors import HFTError
from hft.model.anatomy import Anatomy, Unit
from hft.selection import stored
from hft.selection.masks import Mask, broadcasts
from hft.selection.selection import FRACTIONS, Choice, Selection, SelectionConfig
from hft.userfile import load_from_file


def select(anatomy: Anatomy, config: SelectionConfig) -> Selection:
    """Make the selection of one round."""
    policies: dict[str, Callable[[Anatomy, SelectionConfig], Choice]] = {
        "category": category,
        "layer": _layer,
        "model": _model,
        "bottom": _bottom,
        "explicit": _explicit,
        "all": lambda anatomy, config: anatomy.units,
        "random-element": _random_element,
        "importance": stored.importance,
        "core": stored.core,
    }
    if config.policy == "importance":
        config = stored.with_scored_settings(config)
    return build_selection(anatomy, config, policies.get(config.policy, _own)(anatomy, config))


def build_selection(anatomy: Anatomy, config: SelectionConfig, choice: Choice) -> Selection:
    """The selection that a policy's choice amounts to; refuses one that names what the model does not have."""
    units, masks = choice if isinstance(choice, tuple) and isinstance(choice[-1], Mapping) else (choice, {})
    known, outside = {unit.name for unit in anatomy.units}, anatomy.embeddings | anatomy.others
    try:
        trained = frozenset(unit.name for unit in units)
    except (TypeError, AttributeError) as error:
        raise HFTError(f"policy {config.policy} must return units of the anatomy: {error}") from error
    if strange := [*(trained - known), *(masks.keys() - anatomy.shapes.keys() - outside.keys())]:
        raise HFTError(f"policy {config.policy} chose {strange[0]}, which the model does not have")
    whole = frozenset(name for name, mask in masks.items() if mask is None and name in outside)
    masks = {name: _checked(anatomy, config, name, mask) for name, mask in masks.items() if name not in whole}
    routers = {unit.name for unit in anatomy.units if unit.block == "router"}
    if config.freeze_router:
        trained -= routers
    elif config.policy in ("layer", "model"):
        trained |= routers
    return Selection(anatomy, config, trained, masks, whole)


def _checked(anatomy: Anatomy, config: SelectionConfig, name: str, mask: object) -> Mask:
    """A policy's mask of a parameter; of one outside the layers only the number of elements is known."""
    if not isinstance(mask, Mask):
        kind = getattr(mask, "dtype", type(mask).__name__)
        if kind != torch.bool:
            raise HFTError(f"policy {config.policy} must give a bool tensor for {name}, True to train it; got {kind}")
        mask = Mask.of(mask)
    shape = anatomy.shapes.get(name)
    if not (broadcasts(mask.shape, shape) if shape else mask.numel == anatomy.numels[name]):
        shapes = f"{mask.shape} for {name}, whose shape is {shape or (anatomy.numels[name],)}"
        raise HFTError(f"policy {config.policy} gives a mask of shape {shapes}; each dimension must be equal or 1")
    return mask


def half_of_the_norms(anatomy: Anatomy, config: SelectionConfig) -> list[Unit]:
    """All units but the norms that the category policy would freeze."""
    norms = {unit.name for unit in category(anatomy, config) if unit.block == "norm"}
    return [unit for unit in anatomy.units if unit.block != "norm" or unit.name in norms]


def _own(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """The choice of a user's policy, `FILE.py:FUNCTION`, with `policy_options` as its further arguments."""
    path, _, name = config.policy.rpartition(":")
    function, options = load_from_file(config.policy, "policy"), config.policy_options or {}
    if not callable(function):
        raise HFTError(f"policy {config.policy}: {path} has no function {name}")
    try:
        inspect.signature(function).bind(anatomy, config, **options)
    except TypeError as error:
        raise HFTError(f"policy {config.policy}: policy_options do not fit {name}: {error}") from error
    return function(anatomy, config, **options)


def sample_names(names: Iterable[str], count: int, *key: object) -> list[str]:
    """Draw `count` of `names` without replacement, uniformly, as a pure function of the names and the key.

    The names with the smallest SHA-256 of key and name are drawn. Unlike `random.sample` this depends on neither the
    order of the names nor the Python version.
    """
    prefix = "/".join(map(str, key))
    return sorted(names, key=lambda name: hashlib.sha256(f"{prefix}/{name}".encode()).digest())[:count]


def _pools(anatomy: Anatomy) -> Iterable[tuple[str, list[list[Unit]]]]:
    """The sets of like units that the category policy draws from: a name, and one set per layer of a kind.

    Layers need not be alike (DeepSeek's first ones have no experts); those with as many units in a set are of a kind.
    With grouped queries attention is two pools, {q, o} and {k, v}, whose members have the same shape, so that half of
    the units is half of the parameters (A.4.12; A.4.1 groups them otherwise). Norms of queries and keys are apart from
    those of the hidden state, and all experts of a layer from an MLP that every token takes.
    """
    grouped = anatomy.grouped_query
    alike: dict[tuple[str, int], list[list[Unit]]] = {}
    for layer in anatomy.layers:
        pools: dict[str, list[Unit]] = {}
        for unit in layer:
            pool = unit.block
            if unit.block == "attention" and grouped:
                pool += ".kv" if unit.kind in ("k_proj", "v_proj") else ".qo"
            elif unit.kind in ("q_norm", "k_norm"):
                pool += ".qk"
            pools.setdefault(pool, []).append(unit)
        for pool, units in pools.items():
            alike.setdefault((pool, len(units)), []).append(units)
    return [(pool, units) for (pool, _), units in alike.items()]


def category(anatomy: Anatomy, config: SelectionConfig, importance: Mapping[str, float] | None = None) -> list[Unit]:
    """Algorithm 1: of each block in each layer a random fraction trains.

    A fraction that is not a whole number of units in a layer is met over the layers: half of three MLP matrices is one
    in half of the layers and two in the others, and the seed draws which. The paper leaves mixtures of experts open
    (Limitations). Here half of a layer's expert matrices train, drawn among all of its experts; routers, a small part
    of the layer, train, since they have to follow experts that change.

    Where every unit of a pool has an importance, by unit name, the least important ones train.
    """
    key = ("category", config.selection_seed, config.round)
    frozen_first = _named(anatomy, "freeze", config.freeze or ())
    trained = []
    for pool, units in _pools(anatomy):
        block = pool.partition(".")[0]
        block_fraction = 1.0 if block == "router" else getattr(config, FRACTIONS[block])
        fraction = config.fraction if block_fraction is None else block_fraction
        count, left_over = divmod(round(fraction * sum(map(len, units))), len(units))
        layers = sample_names(map(str, range(len(units))), left_over, *key, pool, "layers that round up")
        for layer, members in enumerate(units):
            names = sample_names((unit.name for unit in members), len(members), *key)
            if importance is not None and all(name in importance for name in names):
                names.sort(key=importance.get)
            drawn = set(sorted(names, key=frozen_first.__contains__)[: count + (str(layer) in layers)])
            trained += [unit for unit in members if unit.name in drawn]
    if left := next((unit for unit in trained if unit.name in frozen_first), None):
        is_router = left.block == "router"
        hint = "freeze_router freezes routers" if is_router else "lower the fraction, or take the explicit policy"
        raise HFTError(f"freeze lists {left.name}, but it lists more units than the fraction leaves frozen; {hint}")
    return trained


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


def _bottom(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """The upper layers train; those below and the input embeddings are frozen (Spurious Forgetting, 2501.13453)."""
    first = anatomy.num_layers - round(config.fraction * anatomy.num_layers)
    return [unit for unit in anatomy.units if unit.layer >= first], {next(iter(anatomy.embeddings)): None}


def _explicit(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """All units but those that `freeze` names; or only what `train` names, in the layers or outside."""
    if not config.train:
        frozen = _named(anatomy, "freeze", config.freeze or ())
        return [unit for unit in anatomy.units if unit.name not in frozen]
    outside = {name.rpartition(".")[0]: name for name in [*anatomy.embeddings, *anatomy.others]}
    trained = _named(anatomy, "train", config.train, outside)
    frozen_outside = {name: None for module, name in outside.items() if module not in trained}
    return [unit for unit in anatomy.units if unit.name in trained], frozen_outside


def _named(anatomy: Anatomy, key: str, patterns: Iterable[str], outside: Iterable[str] = ()) -> set[str]:
    """The units, and modules outside the layers, whose name or kind matches a pattern, or whose layer is in `16-31`."""
    known = {unit.name: (unit.kind, unit.layer) for unit in anatomy.units}
    known |= {module: (module.rpartition(".")[2], None) for module in outside}
    found = set()
    for pattern in patterns:
        if between := re.fullmatch(r"(\d+)-(\d+)", pattern):
            layers = range(int(between[1]), int(between[2]) + 1)
            matching = {name for name, (_, layer) in known.items() if layer in layers}
        else:
            matching = {n for n, (kind, _) in known.items() if fnmatchcase(n, pattern) or fnmatchcase(kind, pattern)}
        if not matching:
            kinds = ", ".join(dict.fromkeys(kind for kind, _ in known.values()))
            raise HFTError(f"{key}: no unit matches {pattern!r}; the kinds here are {kinds}")
        found |= matching
    return found


def _random_element(anatomy: Anatomy, config: SelectionConfig) -> Choice:
    """A fraction of each matrix's elements trains, drawn at random (SpaRTA, 2502.15975); biases and norms whole."""

    def draw(name: str, count: int) -> torch.Tensor:
        size = math.prod(shapes[name])
        key = f"random-element/{config.selection_seed}/{config.round}/{name}"
        # The raw stream of a counter-based generator is the same in every version of numpy and on every machine.
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        numbers = np.random.Philox(key=seed).random_raw(size)
        trained = np.zeros(size, dtype=bool)
        trained[np.argpartition(numbers, count - 1)[:count] if count else []] = True
        return Mask.of(torch.from_numpy(trained)).bits

    shapes = {name: shape for name, shape in anatomy.shapes.items() if len(shape) > 1}
    counts = {name: round(config.fraction * math.prod(shape)) for name, shape in shapes.items()}
    masks = {name: Mask(functools.partial(draw, name, n), shapes[name], n) for name, n in counts.items()}
    return anatomy.units, masks
