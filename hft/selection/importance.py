"""Scores how much each matrix, input column or weight matters to general text; masks that freeze what matters most.

The family of SSU (2512.04844): by magnitude, by Wanda, or by Fisher information. Only the matrices of the layers are
scored, those with weights of shape (out, in). Norms and biases get neither score nor mask: `select_by_importance` draws
half of the norms as the category policy does, and biases train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.errors import HFTError, reason
from hft.model.anatomy import Anatomy
from hft.selection.masks import Mask, largest
from hft.selection.policies import build_selection, category, half_of_the_norms
from hft.selection.selection import SCORES, Selection, SelectionConfig

REDUCTIONS = {
    "unit": torch.mean,
    "column": lambda scores: scores.sum(dim=0, keepdim=True),
    "element": lambda scores: scores,
}

Batches = Iterable[Mapping[str, torch.Tensor]]
Reduction = Callable[[torch.Tensor], torch.Tensor]


def select_by_importance(
    model: PreTrainedModel, anatomy: Anatomy, config: SelectionConfig, batches: Batches
) -> Selection:
    """Make the selection of the importance policy: freeze what matters most to the base, or least with `invert`.

    At unit granularity the budget and the pools are the category policy's, so that it differs from HFT in nothing but
    which units of a pool are frozen. Columns and elements are ranked within each matrix. Norms are drawn as in HFT;
    biases train, as at unit granularity they do with their matrix.

    Args:
        model: the base, with its weights, not sharded.
        anatomy: the model's.
        config: with granularity and score.
        batches: general text, as `text_batches` gives it.

    Raises:
        HFTError: the model has matrices that are not linear layers of their own: experts, fused projections, or Conv1D.
    """
    check_linear(model, anatomy)
    if config.granularity == "unit":
        scores = unit_scores(model, anatomy, batches, score=config.score)
        importance = {name: -score if config.invert else score for name, score in scores.items()}
        return build_selection(anatomy, config, category(anatomy, config, importance))
    trained = half_of_the_norms(anatomy, config)
    settings = {"score": config.score, "granularity": config.granularity, "invert": config.invert}
    return build_selection(
        anatomy, config, (trained, masks(model, anatomy, batches, fraction=config.fraction, **settings))
    )


def selection_from_masks(
    anatomy: Anatomy, config: SelectionConfig, trained_units: Iterable[str], frozen_masks: Mapping[str, Mask]
) -> Selection:
    """The selection that was made before, by another process or before a run was killed."""
    return Selection(anatomy, config, frozenset(trained_units), {name: ~mask for name, mask in frozen_masks.items()})


def check_linear(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse models whose matrices are not linear layers of their own; the model may be on `meta`.

    Raises:
        HFTError: one is fused with others, an expert among others, or a Conv1D.
    """
    modules = dict(model.named_modules())
    for unit in anatomy.units:
        if unit.block != "norm" and not isinstance(modules.get(unit.name), nn.Linear):
            raise HFTError(
                f"importance and mixout work on linear layers, and {unit.name} is not one; choose another method"
            )


def masks(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Batches,
    *,
    score: str = "wanda",
    granularity: str = "column",
    fraction: float = 0.5,
    invert: bool = False,
) -> dict[str, torch.Tensor]:
    """Of each matrix freeze the input columns, or the elements, that score highest (SSU's default: half the columns).

    Args:
        model: the base, with its weights, not sharded.
        anatomy: the model's.
        batches: as `text_batches` gives them; SSU takes 500 rows of the base's own kind of data. Unused for magnitude.
        score: one of `SCORES`.
        granularity: `column`, scored by the sum over its rows, or `element`.
        fraction: what trains of each matrix; the count is rounded.
        invert: freeze what scores lowest instead.

    Returns:
        For each matrix's parameter a bool tensor, True where it trains, of shape (1, in) or (out, in), on the CPU. Of
        equal scores the first is frozen first.

    Raises:
        HFTError: an unknown score or granularity, a fraction outside 0..1, or no text where it is needed.
    """
    if granularity not in ("column", "element"):
        raise HFTError(f"granularity must be column or element, got {granularity!r}")
    _check_fraction(fraction)
    found = {}
    for name, scores in _scores(model, anatomy, batches, score, REDUCTIONS[granularity]):
        frozen = largest(-scores if invert else scores, scores.numel() - _count(fraction, scores.numel()))
        found[name] = ~frozen.cpu()
    return found


def unit_scores(
    model: PreTrainedModel, anatomy: Anatomy, batches: Batches, *, score: str = "wanda"
) -> dict[str, float]:
    """The mean score of each matrix's elements, by unit, to compare units of the same pool; arguments as in `masks`."""
    units = {name: unit.name for unit in anatomy.units for name in unit.parameters}
    return {units[name]: float(value) for name, value in _scores(model, anatomy, batches, score, REDUCTIONS["unit"])}


def input_norms(model: PreTrainedModel, names: Iterable[str], batches: Batches) -> dict[str, torch.Tensor]:
    """The L2 norm of each input feature of linear layers, over all tokens (Wanda, 2306.11695, equation 1).

    SSU's released code takes another factor, the mean square of the feature.

    Args:
        model: the base.
        names: of the layers' weights.
        batches: of text.

    Returns:
        fp32 norms of shape (in,) by name: nothing else is kept of the activations.
    """
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def add(module: nn.Module, inputs: tuple) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].detach().float().square().flatten(0, -2).sum(dim=0)

        return add

    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            for ids in _samples(model, batches, "measuring activations"):
                model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def fisher(
    model: PreTrainedModel, names: Iterable[str], batches: Batches, reduction: Reduction
) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information: the mean over samples of the squared gradient of the loss.

    A sample is one row of text and its loss the mean over its tokens. Squared is the gradient of each sample by itself,
    as the Fisher information of EWC (1612.00796, section 2) asks, not that of a batch, in which signs cancel.

    Args:
        model: the base.
        names: of the parameters; nothing else gets a gradient.
        batches: of text.
        reduction: linear, applied to the squares before they are summed, so that only the elements themselves take an
            fp32 sum as large as the weights: 26 GB for Llama-2-7B. One gradient is held at a time.

    Returns:
        The reduced fp32 means by name.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def add(parameter: nn.Parameter) -> None:
            value = reduction(parameter.grad.float().square())
            sums[name] = sums[name].add_(value) if name in sums else value
            parameter.grad = None

        return add

    wanted = {name: model.get_parameter(name) for name in names}
    count = 0
    with _gradients_of(model, wanted.values()), torch.enable_grad():
        handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in wanted.items()]
        try:
            for ids in _samples(model, batches, "measuring gradients"):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    return {name: sums[name] / count for name in wanted}


def text_batches(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[str | Mapping[str, Any]], max_length: int, count: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Tokenize the first rows of general text, each a batch of its own, without padding.

    Args:
        tokenizer: the base's. Chats are rendered with its chat template, or else their contents are joined.
        rows: texts, or rows with `text`, `messages`, or `prompt` and `completion` as messages.
        max_length: tokens kept per row.
        count: rows to take; those with fewer than two tokens have nothing to predict and are passed over.

    Raises:
        HFTError: a row has none of these columns.
    """
    taken = 0
    for row in rows:
        if taken == count:
            return
        try:
            text, rendered = _text(tokenizer, row)
            ids = tokenizer(text, truncation=True, max_length=max_length, add_special_tokens=not rendered)["input_ids"]
        except HFTError:
            raise
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise HFTError(f"a row of the text to score by cannot be used: {reason(error)}; drop it") from error
        if len(ids) > 1:
            taken += 1
            yield {"input_ids": torch.tensor([ids])}


def _text(tokenizer: PreTrainedTokenizerBase, row: str | Mapping[str, Any]) -> tuple[str, bool]:
    """A row as text, and whether a chat template wrote it, which brings its own special tokens."""
    if isinstance(row, str) or "text" in row:
        return (row if isinstance(row, str) else row["text"]), False
    messages = row["messages"] if "messages" in row else [*row.get("prompt", ()), *row.get("completion", ())]
    if not messages or isinstance(messages[0], str):
        raise HFTError(f"text for scores needs text, messages, or prompt and completion as messages; got {list(row)}")
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False), True
    return "\n\n".join(message["content"] for message in messages), False


def _scores(
    model: PreTrainedModel, anatomy: Anatomy, batches: Batches, score: str, reduction: Reduction
) -> Iterator[tuple[str, torch.Tensor]]:
    """The reduced scores of each matrix, by parameter; never more than one matrix of elements, but for Fisher."""
    if score not in SCORES:
        raise HFTError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    matrices = _matrices(model, anatomy)
    if score == "fisher":
        yield from fisher(model, matrices, batches, reduction).items()
        return
    norms = input_norms(model, matrices, batches) if score == "wanda" else {}
    for name, weight in tqdm(matrices.items(), desc=f"scoring by {score}", unit="matrix", leave=False):
        scores = weight.detach().float().abs()
        yield name, reduction(scores * norms[name] if score == "wanda" else scores)


def _matrices(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
    names = [name for unit in anatomy.units if unit.block != "norm" for name in unit.parameters]
    parameters = {name: model.get_parameter(name) for name in names}
    return {name: parameter for name, parameter in parameters.items() if parameter.ndim == 2}


def _samples(model: PreTrainedModel, batches: Batches, description: str) -> Iterator[torch.Tensor]:
    """Token ids of one row after the other, (1, length), padding cut off, while the model is set to evaluate."""
    was_training, empty = model.training, True
    model.eval()
    try:
        for batch in tqdm(batches, desc=description, unit="batch", leave=False):
            kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            for ids, keep in zip(batch["input_ids"], kept, strict=True):
                empty = False
                yield ids[keep].unsqueeze(0).to(model.device)
    finally:
        model.train(was_training)
    if empty:
        raise HFTError("no text to score by; give rows of general text")


@contextmanager
def _gradients_of(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it these parameters require gradients and no others."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _count(fraction: float, size: int) -> int:
    return round(fraction * size)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise HFTError(f"fraction must lie in 0..1, got {fraction}")
