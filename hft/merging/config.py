"""What `hft merge` takes: its settings, and which of them each way of merging has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from hft.config import Fraction, option
from hft.errors import HFTError


@dataclass
class MergeConfig:
    """How `hft merge` merges what."""

    method: Literal["average", "ties", "dare", "dare-ties", "slerp", "wise-ft", "adapter", "delta"] | None = option(
        "average: the mean of the weights; ties: the largest deltas that agree with the majority sign; dare: random "
        "deltas, rescaled; dare-ties: those of dare that agree with the majority sign; slerp: a point on the arc "
        "between two models; wise-ft: a point on the line from base to model; adapter: a PEFT adapter added to its "
        "base; delta: what a run saved with save_only_trained, put back into its base."
    )
    models: list[str] | None = option("Models to merge: folders or Hub ids.")
    base: str | None = option("The model that they were all tuned from.")
    out: str | None = option("Folder for the result.")
    weights: list[float] | None = option("Per model, by default equal; average divides by their sum, dare does not.")
    density: Fraction = option("Fraction of each model's deltas to keep (ties).", 0.2)
    trim: Literal["tensor", "global"] = option("Apply density to each tensor, or to the whole model (ties).", "tensor")
    drop: Annotated[float, Field(ge=0, lt=1)] = option("Probability of dropping a delta (dare, dare-ties).", 0.9)
    seed: int = option("Seed for dropping deltas (dare, dare-ties).", 0)
    scale: float = option("Factor of the merged deltas: TIES' lambda.", 1.0)
    t: Fraction = option("Position between the first model (0) and the second (1) (slerp).", 0.5)
    alpha: Fraction | dict[str, Fraction] = option(
        "Position between base (0) and model (1) (wise-ft); or one for each of attention, mlp, norm and outside.", 0.5
    )
    max_shard_size: str = option("Largest size of a file.", "5GB")


class Operator(NamedTuple):
    """What a way of merging takes."""

    fewest: int  # models
    most: int | None  # None for any number
    base: bool  # whether it needs one; average and slerp ignore it
    keys: tuple[str, ...] = ()  # which of `MergeConfig`'s settings it has


OPERATORS = {
    "average": Operator(2, None, False, ("weights",)),
    "ties": Operator(1, None, True, ("density", "trim", "scale")),
    "dare": Operator(1, None, True, ("drop", "seed", "weights", "scale")),
    "dare-ties": Operator(1, None, True, ("drop", "seed", "scale")),
    "slerp": Operator(2, 2, False, ("t",)),
    "wise-ft": Operator(1, 1, True, ("alpha",)),
    "adapter": Operator(1, 1, False),
    "delta": Operator(1, 1, False),
}


def check_config(config: MergeConfig, given: dict[str, Any]) -> None:
    """Refuse a missing argument, a wrong number of models or weights, and settings of another operator."""
    if not (config.method and config.models and config.out):
        raise HFTError("method, models and out are needed: give them as flags, or a recipe with --config")
    operator, count = OPERATORS[config.method], len(config.models)
    if count < operator.fewest or (operator.most and count > operator.most):
        wanted = f"{operator.fewest} model{'s' if operator.fewest > 1 else ''}{'' if operator.most else ' or more'}"
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
