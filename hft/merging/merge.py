"""`hft merge`: models merged tensor by tensor, without training (paper section 4.4, Table 5)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, random_pruning

from hft.config import Keys, fill, read_arguments, to_yaml
from hft.errors import HFTError
from hft.machine import say
from hft.merging.checkpoint import Checkpoint, check_alike, check_out, new_folder, why_not_base, write_model
from hft.merging.config import OPERATORS, MergeConfig, check_config
from hft.merging.onto_base import merge_adapter, merge_delta
from hft.merging.operators import MagnitudePruner, TensorOf, between, generator_of, slerp_factors, weighted_sum
from hft.model.anatomy import anatomy_of, meta_model
from hft.record.identity import companions_of
from hft.record.manifest import absolute_or_hub_id, rounds_so_far
from hft.runs.result import CONFIG_NAME


def main(arguments: Sequence[str]) -> int:
    """Merge models: `--method M --models M1 [M2 ...] [--base B] --out O`, settings, or `--config RECIPE.yaml`."""
    groups = {"merge": (MergeConfig,)}
    given, _ = read_arguments(arguments, "hft merge", "Merge models.", groups).resolve(Keys((MergeConfig,)))
    config = fill(MergeConfig, given)
    check_config(config, given)
    write = {"adapter": merge_adapter, "delta": merge_delta}.get(config.method, merge)(config)
    with new_folder(Path(config.out)) as folder:
        done = write(folder)
        (folder / CONFIG_NAME).write_text(to_yaml(given))
    say(done, "", config.out)
    return 0


def merge(config: MergeConfig) -> Callable[[Path], str]:
    """Open and check models, and return what merges them tensor by tensor and says how much it wrote."""
    models = [Checkpoint.open(name) for name in config.models]
    base = Checkpoint.open(config.base) if OPERATORS[config.method].base else None
    inputs = [*models, *([base] if base else [])]
    check_out(Path(config.out), [model.folder for model in inputs])
    check_alike(*inputs)
    for model in models if base else ():
        if sentence := why_not_base(model, base):
            raise HFTError(sentence)
    like = tuned_of(models)

    def write(folder: Path) -> str:
        if config.method == "wise-ft":
            merged = on_the_line(base, models[0], config.alpha)
        else:
            merged = with_deltas(config, models, base) if base else interpolated(config, models)
        done = write_model(folder, like, merged, max_shard_size=config.max_shard_size)
        ours, others = companions_of(like.folder), [companions_of(model.folder) for model in models]
        differ = sorted({part for theirs in others for part in ours | theirs if ours.get(part) != theirs.get(part)})
        note = f"\nNOTE: not all models have the same {', '.join(differ)}; taken from {like.name}"
        return done + note if differ else done

    return write


def tuned_of(models: Sequence[Checkpoint]) -> Checkpoint:
    """Whose other files a merge takes: the model's that was tuned from others, or the first with a template."""
    names = {absolute_or_hub_id(model.name) for model in models}

    def rank(model: Checkpoint) -> tuple[int, bool]:
        config = model.folder / "tokenizer_config.json"
        in_config = config.exists() and '"chat_template"' in config.read_text()
        rounds = sum(one["base"] in names for one in rounds_so_far(model.folder))
        return rounds, in_config or (model.folder / "chat_template.jinja").exists()

    return max(models, key=rank)


def interpolated(config: MergeConfig, models: Sequence[Checkpoint]) -> TensorOf:
    """The models' weights themselves, averaged or by slerp."""
    weights = config.weights or [1.0] * len(models)
    shares = [weight / sum(weights) for weight in weights]

    def merged(name: str) -> torch.Tensor:
        tensors = [model.fp32(name) for model in models]
        return weighted_sum(tensors, slerp_factors(*tensors, config.t) if config.method == "slerp" else shares)

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
    """A base and what the models add to it, by TIES or DARE.

    DARE merges by the mean unless weights are given, as its authors do; what it drops depends on seed, model and name.
    """
    weights = config.weights or [1 / len(models)] * len(models)

    def delta_of(index: int, name: str) -> torch.Tensor:
        return models[index].fp32(name) - base.fp32(name)

    @functools.cache
    def pruner(index: int, *names: str) -> MagnitudePruner:
        return MagnitudePruner(functools.partial(delta_of, index), names, config.density)

    def pruned(index: int, name: str) -> torch.Tensor:
        if config.method == "ties":
            return pruner(index, *(base.parameters if config.trim == "global" else [name]))(delta_of(index, name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_of(f"{config.seed}/{index}/{name}").initial_seed())
            return random_pruning(delta_of(index, name), 1 - config.drop, rescale=True)

    def merged(name: str) -> torch.Tensor:
        deltas = torch.stack([pruned(index, name) for index in range(len(models))])
        if config.method == "dare":
            combined = weighted_sum(deltas, weights)
        else:
            combined = disjoint_merge(deltas, calculate_majority_sign_mask(deltas))
        return base.fp32(name) + config.scale * combined

    return merged
