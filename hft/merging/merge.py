"""`hft merge`: models merged tensor by tensor, without training (paper section 4.4, Table 5)."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hft.config import Keys, fill, read_arguments, to_yaml
from hft.errors import HFTError
from hft.machine import say
from hft.merging.checkpoint import (
    Checkpoint,
    check_alike,
    check_out,
    new_folder,
    plan_files,
    write_model,
    written_in,
)
from hft.merging.operators import (
    COLINEAR_COS,
    MagnitudePruner,
    generator_of,
    random_prune,
    slerp_factors,
    ties_merge,
    weighted_sum,
)
from hft.runs.result import CONFIG_NAME

TensorOf = Callable[[str], torch.Tensor]  # a parameter, by its name


@dataclass
class MergeConfig:
    """How `hft merge` merges what."""

    method: Literal["average", "ties", "dare", "dare-ties", "slerp", "wise-ft", "adapter", "delta"] | None = field(
        default=None,
        metadata={
            "help": "average: the mean of the weights; ties: the largest deltas, by the sign that wins; dare: random "
            "deltas, rescaled; dare-ties: those, by the sign that wins; slerp: on the arc between two models; wise-ft: "
            "on the line from base to model; adapter: an adapter of PEFT's added to its base; delta: what a run saved "
            "with save_only_trained, put back into its base."
        },
    )
    models: list[str] | None = field(default=None, metadata={"help": "Models to merge: folders or Hub ids."})
    base: str | None = field(default=None, metadata={"help": "The model that they were all tuned from."})
    out: str | None = field(default=None, metadata={"help": "Folder for the result."})
    weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One weight per model, by default equal ones that sum to 1; average divides them by their sum, "
            "dare takes them as they are."
        },
    )
    density: float = field(default=0.2, metadata={"help": "Fraction of each model's deltas to keep (ties)."})
    trim: Literal["tensor", "global"] = field(
        default="tensor", metadata={"help": "Take that fraction of each tensor, or of the whole model (ties)."}
    )
    drop: float = field(default=0.9, metadata={"help": "Probability to drop a delta (dare, dare-ties)."})
    seed: int = field(default=0, metadata={"help": "Seed of what is dropped (dare, dare-ties)."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the merged deltas: TIES' lambda."})
    t: float = field(default=0.5, metadata={"help": "From the first model, 0, to the second, 1 (slerp)."})
    alpha: float = field(default=0.5, metadata={"help": "From the base, 0, to the model, 1 (wise-ft)."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest size of a file."})

    def __post_init__(self):
        for name in ("density", "drop", "t", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise HFTError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.drop == 1:
            raise HFTError("drop must be less than 1: with everything dropped there is nothing left to rescale")


@dataclass(frozen=True)
class Operator:
    """What a way of merging takes."""

    models: tuple[int, int | None]  # fewest and most; None for any number
    base: Literal[True] | None  # whether it needs one; None where one may be given, which average and slerp ignore
    keys: tuple[str, ...]  # which of `MergeConfig`'s settings it has


OPERATORS = {
    "average": Operator((2, None), None, ("weights",)),
    "ties": Operator((1, None), True, ("density", "trim", "scale")),
    "dare": Operator((1, None), True, ("drop", "seed", "weights", "scale")),
    "dare-ties": Operator((1, None), True, ("drop", "seed", "scale")),
    "slerp": Operator((2, 2), None, ("t",)),
    "wise-ft": Operator((1, 1), True, ("alpha",)),
    "adapter": Operator((1, 1), None, ()),
    "delta": Operator((1, 1), None, ()),
}


def main(arguments: Sequence[str]) -> int:
    """Merge models: `--method M --models M1 [M2 ...] [--base B] --out O`, settings, or `--config RECIPE.yaml`."""
    groups = {"merge": (MergeConfig,)}
    given, _ = read_arguments(arguments, "hft merge", "Merge models.", groups).resolve(Keys((MergeConfig,)))
    config = fill(MergeConfig, given)
    check_config(config, given)

    def finish(folder: Path) -> None:
        (folder / CONFIG_NAME).write_text(to_yaml(given))

    if config.method in ("adapter", "delta"):
        if config.method == "delta":
            from hft.merging.delta import merge_delta as join
        else:  # and with it peft, which takes longer to import than all else
            from hft.merging.adapter import merge_adapter as join
        [part], size = config.models, config.max_shard_size
        done = join(part, config.base, Path(config.out), finish, max_shard_size=size)
    else:
        done = merge(config, finish)
    say(done, "", config.out)
    return 0


def merge(config: MergeConfig, finish: Callable[[Path], None]) -> str:
    """Merge models tensor by tensor; `finish` is called with the folder before it is renamed to `out`.

    Returns:
        How much was written, and how fast; and which way slerp went.
    """
    out, models = Path(config.out), [Checkpoint.open(name) for name in config.models]
    base = Checkpoint.open(config.base) if OPERATORS[config.method].base else None
    inputs = [*models, *([base] if base else [])]
    check_out(out, inputs)
    check_alike(*inputs)
    start, branches = time.monotonic(), Counter()
    with new_folder(out) as folder:
        # Fails before passes over the models do.
        plan_files(folder, models[0].specs, models[0].parameters, config.max_shard_size)
        merged = interpolated(config, models, branches) if base is None else with_deltas(config, models, base)
        speed = written_in(write_model(folder, models[0], merged, max_shard_size=config.max_shard_size), start)
        finish(folder)
    if not branches:
        return speed
    arc, line = f"{branches['arc']} tensors along the arc", f"{branches['line']} along the line"
    return f"slerp: {arc}, {line} (|cos| > {COLINEAR_COS})\n{speed}"


def check_config(config: MergeConfig, given: dict[str, Any]) -> None:
    """Refuse a missing argument, a wrong number of models or weights, and settings of another operator."""
    if not (config.method and config.models and config.out):
        raise HFTError("method, models and out are needed: give them as flags, or a recipe with --config")
    operator, count = OPERATORS[config.method], len(config.models)
    fewest, most = operator.models
    if count < fewest or (most and count > most):
        wanted = f"{fewest} model{'s' if fewest > 1 else ''}" + ("" if most else " or more")
        raise HFTError(f"{config.method} takes {wanted}, got {count}")
    if operator.base and not config.base:
        raise HFTError(f"{config.method} needs --base, the model that they were tuned from")
    settings = {key for other in OPERATORS.values() for key in other.keys}
    if wrong := [key for key in given if key in settings and key not in operator.keys]:
        takes = f"takes only {', '.join(operator.keys)}" if operator.keys else "takes no settings"
        raise HFTError(f"{wrong[0]} is not a setting of {config.method}, which {takes}")
    if config.weights and (len(config.weights) != count or not all(map(math.isfinite, config.weights))):
        raise HFTError(f"weights must be {count} numbers, one per model, got {config.weights}")
    if config.weights and config.method == "average" and not sum(config.weights):
        raise HFTError(f"average divides weights by their sum, which must not be 0, got {config.weights}")


def interpolated(config: MergeConfig, models: Sequence[Checkpoint], branches: Counter[str]) -> TensorOf:
    """Operators that merge the weights themselves, average and slerp; `branches` counts the way slerp takes."""
    weights = config.weights or [1.0] * len(models)

    def average(name: str) -> torch.Tensor:
        return weighted_sum([model.fp32(name) for model in models], [weight / sum(weights) for weight in weights])

    def slerp(name: str) -> torch.Tensor:
        tensors = [model.fp32(name) for model in models]
        *factors, branch = slerp_factors(*tensors, config.t)
        branches[branch] += 1
        return weighted_sum(tensors, factors)

    return {"average": average, "slerp": slerp}[config.method]


def with_deltas(config: MergeConfig, models: Sequence[Checkpoint], base: Checkpoint) -> TensorOf:
    """Operators that merge what the models add to their base.

    DARE merges the rescaled deltas by their mean unless weights are given, as its authors do with language models. What
    it drops depends on seed, model and name alone.
    """
    weights = [config.alpha] if config.method == "wise-ft" else config.weights or [1 / len(models)] * len(models)
    combine = ties_merge if "ties" in config.method else lambda deltas: weighted_sum(deltas, weights)

    def delta(model: Checkpoint, name: str) -> torch.Tensor:
        return model.fp32(name) - base.fp32(name)

    def pruners(names: Sequence[str]) -> list[MagnitudePruner]:
        return [MagnitudePruner(functools.partial(delta, model), names, config.density) for model in models]

    by_model = pruners(base.parameters) if config.method == "ties" and config.trim == "global" else None

    def changes(name: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """What is done to the deltas of each model before they are combined."""
        if config.method == "ties":
            return by_model or pruners([name])
        if config.method in ("dare", "dare-ties"):
            generators = [generator_of(f"{config.seed}/{index}/{name}") for index in range(len(models))]
            return [functools.partial(random_prune, p=config.drop, generator=one) for one in generators]
        return [lambda delta: delta] * len(models)

    def merged(name: str) -> torch.Tensor:
        deltas = [change(delta(model, name)) for change, model in zip(changes(name), models, strict=True)]
        return base.fp32(name) + config.scale * combine(deltas)

    return merged
