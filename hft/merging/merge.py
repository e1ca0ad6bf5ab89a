"""`hft merge`: models merged tensor by tensor, without training (paper section 4.4, Table 5)."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from hft.config import Keys, fill, read_arguments, to_yaml
from hft.errors import HFTError
from hft.machine import say
from hft.merging.checkpoint import Checkpoint, check_alike, check_out, new_folder, why_not_base, write_model
from hft.merging.config import OPERATORS, MergeConfig, check_config
from hft.merging.operators import (
    COLINEAR_COS,
    MagnitudePruner,
    between,
    generator_of,
    random_prune,
    slerp_factors,
    ties_merge,
    weighted_sum,
)
from hft.model.anatomy import anatomy_of, meta_model
from hft.record.identity import companions_of
from hft.record.manifest import absolute_or_hub_id, rounds_so_far
from hft.runs.result import CONFIG_NAME

TensorOf = Callable[[str], torch.Tensor]  # a parameter, by its name


def main(arguments: Sequence[str]) -> int:
    """Merge models: `--method M --models M1 [M2 ...] [--base B] --out O`, settings, or `--config RECIPE.yaml`."""
    groups = {"merge": (MergeConfig,)}
    given, _ = read_arguments(arguments, "hft merge", "Merge models.", groups).resolve(Keys((MergeConfig,)))
    config = fill(MergeConfig, given)
    check_config(config, given)
    if config.method == "adapter":  # which imports peft, and that takes longer than all else
        from hft.merging.adapter import merge_adapter as prepare
    elif config.method == "delta":
        from hft.merging.delta import merge_delta as prepare
    else:
        prepare = merge
    write = prepare(config)
    with new_folder(Path(config.out)) as folder:
        done = write(folder)
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    say(done, "", config.out)
    return 0


def merge(config: MergeConfig) -> Callable[[Path], str]:
    """Open models and return what merges them tensor by tensor, and says how much it wrote and which way slerp went."""
    models = [Checkpoint.open(name) for name in config.models]
    base = Checkpoint.open(config.base) if OPERATORS[config.method].base else None
    inputs = [*models, *([base] if base else [])]
    check_out(Path(config.out), inputs)
    check_alike(*inputs)
    if sentence := next(filter(None, (why_not_base(model, base) for model in models if base)), None):
        raise HFTError(sentence)
    like = tuned_of(models)

    def write(folder: Path) -> str:
        branches = Counter()
        if config.method == "wise-ft":
            merged = on_the_line(base, models[0], config.alpha)
        else:
            merged = interpolated(config, models, branches) if base is None else with_deltas(config, models, base)
        done = write_model(folder, like, merged, max_shard_size=config.max_shard_size)
        done += files_taken(like, models)
        if not branches:
            return done
        arc, line = f"{branches['arc']} tensors along the arc", f"{branches['line']} along the line"
        return f"slerp: {arc}, {line} (|cos| > {COLINEAR_COS})\n{done}"

    return write


def tuned_of(models: Sequence[Checkpoint]) -> Checkpoint:
    """Whose other files a merge takes: the model's that was tuned from others, or the first with a template."""
    names = {absolute_or_hub_id(model.name) for model in models}
    rounds = [sum(one["base"] in names for one in rounds_so_far(model.folder)) for model in models]
    if not max(rounds):
        rounds = [has_template(model.folder) for model in models]
    return models[rounds.index(max(rounds))]


def has_template(folder: Path) -> bool:
    """Whether a model's tokenizer has a chat template, in a file or in its config."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (config.exists() and '"chat_template"' in config.read_text())


def files_taken(like: Checkpoint, models: Sequence[Checkpoint]) -> str:
    """A line on whose tokenizer, template and configs a merge has, if they are not those of all models."""
    ours, others = companions_of(like.folder), [companions_of(model.folder) for model in models]
    differ = sorted({part for theirs in others for part in ours | theirs if ours.get(part) != theirs.get(part)})
    return f"\nNOTE: not all models have the same {', '.join(differ)}; taken from {like.name}" if differ else ""


def interpolated(config: MergeConfig, models: Sequence[Checkpoint], branches: Counter[str]) -> TensorOf:
    """Operators that merge the weights themselves, average and slerp; `branches` counts the way slerp takes."""
    weights = config.weights or [1.0] * len(models)

    def merged(name: str) -> torch.Tensor:
        tensors = [model.fp32(name) for model in models]
        if config.method == "average":
            return weighted_sum(tensors, [weight / sum(weights) for weight in weights])
        *factors, branch = slerp_factors(*tensors, config.t)
        branches[branch] += 1
        return weighted_sum(tensors, factors)

    return merged


def on_the_line(base: Checkpoint, tuned: Checkpoint, alpha: float | Mapping[str, float]) -> TensorOf:
    """A base and what was tuned from it, interpolated, by one alpha or by one for each block."""
    blocks = blocks_of(base) if isinstance(alpha, Mapping) else {}
    if blocks and alpha.keys() != set(blocks.values()):
        raise HFTError(f"alpha must have a value for each of {', '.join(sorted(set(blocks.values())))}, got {alpha}")

    def merged(name: str) -> torch.Tensor:
        return between(base.fp32(name), tuned.fp32(name), alpha[blocks[name]] if blocks else alpha)

    return merged


def blocks_of(model: Checkpoint) -> dict[str, str]:
    """The block of each parameter; `outside` the layers that of embeddings and head."""
    units = anatomy_of(meta_model(model.config)).units
    return dict.fromkeys(model.parameters, "outside") | {name: unit.block for unit in units for name in unit.parameters}


def with_deltas(config: MergeConfig, models: Sequence[Checkpoint], base: Checkpoint) -> TensorOf:
    """Operators that merge what the models add to their base.

    DARE merges by the mean unless weights are given, as its authors do; what it drops depends on seed, model and name.
    """
    weights = config.weights or [1 / len(models)] * len(models)
    combine = ties_merge if "ties" in config.method else lambda deltas: weighted_sum(deltas, weights)

    def delta_of(model: Checkpoint, name: str) -> torch.Tensor:
        return model.fp32(name) - base.fp32(name)

    @functools.cache
    def pruner(index: int, *names: str) -> MagnitudePruner:
        return MagnitudePruner(functools.partial(delta_of, models[index]), names, config.density)

    def pruned(index: int, name: str) -> torch.Tensor:
        """The delta of a model, without what is dropped before the deltas are combined."""
        delta = delta_of(models[index], name)
        if config.method == "ties":
            return pruner(index, *(base.parameters if config.trim == "global" else [name]))(delta)
        if config.method in ("dare", "dare-ties"):
            return random_prune(delta, config.drop, generator_of(f"{config.seed}/{index}/{name}"))
        return delta

    def merged(name: str) -> torch.Tensor:
        return base.fp32(name) + config.scale * combine([pruned(index, name) for index in range(len(models))])

    return merged
