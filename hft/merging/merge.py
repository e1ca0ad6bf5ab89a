"""`hft merge`: models merged tensor by tensor, without training (paper section 4.4, Table 5)."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    throughput,
    write_model,
    zip_chunks,
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

Chunks = Callable[[str], Iterator[torch.Tensor]]


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
    """What a way of merging takes.

    Attributes:
        models: fewest and most models; None for any number.
        base: whether it needs a base; None where one may be given, which average and slerp do not use.
        keys: which of `MergeConfig`'s settings it has.
    """

    models: tuple[int, int | None]
    base: Literal[True] | None
    keys: tuple[str, ...]


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
    """Merge models.

    Args:
        arguments: `--method M --models M1 [M2 ...] [--base B] --out O`, settings, or `--config RECIPE.yaml`.

    Returns:
        The exit status, 0.

    Raises:
        HFTError: the method takes other arguments, the models do not fit together, or the folder is not free.
    """
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
        summary = join(part, config.base, Path(config.out), finish, max_shard_size=size)
    else:
        summary = merge(config, finish)
    say(summary, "", config.out)
    return 0


def merge(config: MergeConfig, finish: Callable[[Path], None]) -> str:
    """Merge models tensor by tensor.

    Args:
        config: what to merge, and how.
        finish: called with the folder before it is renamed to `out`.

    Returns:
        How much was read and written, and how fast; and which way slerp went.
    """
    out, models = Path(config.out), [Checkpoint.open(name) for name in config.models]
    base = Checkpoint.open(config.base) if OPERATORS[config.method].base else None
    inputs = [*models, *([base] if base else [])]
    check_out(out, inputs)
    check_alike(*inputs)
    start, branches = time.monotonic(), []
    with new_folder(out) as folder:
        plan_files(folder, models[0], max_shard_size=config.max_shard_size)  # fails before passes over the models do
        merged = interpolated(config, models, branches) if base is None else with_deltas(config, models, base)
        written = write_model(folder, models[0], merged, max_shard_size=config.max_shard_size)
        finish(folder)
    speed = throughput(inputs, written, time.monotonic() - start)
    if not branches:
        return speed
    ways = Counter(branches)
    arc, line = f"{ways['arc']} tensors along the arc", f"{ways['line']} along the line (|cos| > {COLINEAR_COS})"
    return f"slerp: {arc}, {line}\n{speed}"


def check_config(config: MergeConfig, given: dict[str, Any]) -> None:
    """Refuse what an operator does not take.

    Raises:
        HFTError: a missing argument, a wrong number of models or weights, or a setting of another operator.
    """
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


def interpolated(config: MergeConfig, models: Sequence[Checkpoint], branches: list[str]) -> Chunks:
    """The merged chunks of a parameter by name, of operators that merge the weights themselves.

    Args:
        config: its method is average or slerp.
        models: what to merge.
        branches: gets the branch of slerp that each tensor takes.
    """

    def average(name: str) -> Iterator[torch.Tensor]:
        weights = config.weights or [1.0] * len(models)
        for chunks in zip_chunks(models, name):
            yield weighted_sum(chunks, [weight / sum(weights) for weight in weights])

    def slerp(name: str) -> Iterator[torch.Tensor]:
        *factors, branch = slerp_factors(zip_chunks(models, name), config.t)
        branches.append(branch)
        for chunks in zip_chunks(models, name):
            yield weighted_sum(chunks, factors)

    return {"average": average, "slerp": slerp}[config.method]


def with_deltas(config: MergeConfig, models: Sequence[Checkpoint], base: Checkpoint) -> Chunks:
    """The merged chunks of a parameter by name, of operators that merge what the models add to their base.

    DARE merges the rescaled deltas by their mean unless weights are given, as its authors do with language models. What
    it drops depends on seed, model and name alone.
    """
    weights = [config.alpha] if config.method == "wise-ft" else config.weights or [1 / len(models)] * len(models)
    combine = ties_merge if "ties" in config.method else lambda deltas: weighted_sum(deltas, weights)

    def pruners(names: Sequence[str]) -> list[MagnitudePruner]:
        deltas = [functools.partial(deltas_of, model, base) for model in models]
        return [MagnitudePruner(chunks_of, names, config.density) for chunks_of in deltas]

    by_model = pruners(base.parameters) if config.method == "ties" and config.trim == "global" else None

    def changes(name: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """What is done to the deltas of each model before they are combined."""
        if config.method == "ties":
            return by_model or pruners([name])
        if config.method in ("dare", "dare-ties"):
            generators = [generator_of(f"{config.seed}/{index}/{name}") for index in range(len(models))]
            return [functools.partial(random_prune, p=config.drop, generator=one) for one in generators]
        return [lambda delta: delta] * len(models)

    def merged(name: str) -> Iterator[torch.Tensor]:
        change = changes(name)
        for start, *tuned in zip_chunks([base, *models], name):
            deltas = [function(chunk - start) for function, chunk in zip(change, tuned, strict=True)]
            yield start + config.scale * combine(deltas)

    return merged


def deltas_of(model: Checkpoint, base: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """What a model adds to its base in a parameter, in chunks."""
    for tuned, start in zip_chunks([model, base], name):
        yield tuned - start
