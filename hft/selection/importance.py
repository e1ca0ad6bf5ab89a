"""Scores how much each matrix, input column or weight matters to a base; masks that freeze what matters most.

The family of SSU (2512.04844): by magnitude, by Wanda, or by Fisher information; and Spectrum's signal-to-noise ratio.
Only the matrices of the layers are scored, those with weights of shape (out, in).
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.errors import HFTError, reason
from hft.model.anatomy import Anatomy, anatomy_of
from hft.selection.masks import Mask, largest, save_masks
from hft.selection.policies import build_selection, category, half_of_the_norms, select
from hft.selection.selection import READ_TEXT, Selection, SelectionConfig
from hft.selection.stored import IMPORTANCE_NAME, check_scored_base, top_of_each_type

REDUCTIONS = {"unit": torch.mean, "column": lambda scores: scores.sum(dim=0, keepdim=True), "element": lambda x: x}

Texts = Sequence[torch.Tensor]  # token ids of a row each, (1, length)
Reduction = Callable[[torch.Tensor], torch.Tensor]


def select_by_importance(
    model: PreTrainedModel, anatomy: Anatomy, config: SelectionConfig, texts: Texts = ()
) -> Selection:
    """The selection of the importance policy: freeze what matters most to the base, or least with `invert`.

    At unit granularity the budget and the pools are the category policy's, so that it differs from HFT in nothing but
    which units of a pool are frozen; by `snr` they are Spectrum's. Columns and elements are ranked within each matrix,
    and of equal scores the first is frozen first. Norms are drawn as in HFT; biases train.

    The model, which is not sharded, is set to evaluate, and by Fisher only what was scored requires gradients
    afterwards. Only `READ_TEXT` need texts; SSU takes 500 rows of the base's own kind of data.
    """
    scores = importance_scores(model, anatomy, texts, score=config.score, granularity=config.granularity)
    if config.granularity == "unit":
        return by_unit(anatomy, config, {name.rpartition(".")[0]: float(value) for name, value in scores})
    masks = {}
    for name, values in scores:
        frozen = values.numel() - round(config.fraction * values.numel())
        masks[name] = Mask.of(~largest(-values if config.invert else values, frozen).cpu())
    return build_selection(anatomy, config, (half_of_the_norms(anatomy, config), masks))


def by_unit(anatomy: Anatomy, config: SelectionConfig, scores: Mapping[str, float]) -> Selection:
    """The selection of whole units by the scores of all matrices, by unit name."""
    if config.score == "snr":
        return build_selection(anatomy, config, top_of_each_type(anatomy, config, scores))
    ranks = {name: -score if config.invert else score for name, score in scores.items()}
    return build_selection(anatomy, config, category(anatomy, config, ranks))


def planned_selection(model: nn.Module, config: SelectionConfig, base: str) -> Selection:
    """The selection of a run, or one with its exact counts where the run has yet to score its base.

    The model may be on `meta`; `base` is its path or Hub id.
    """
    anatomy = anatomy_of(model)
    check_scored_base(config, base)
    if config.policy != "importance" or config.importance:
        return select(anatomy, config)
    if config.score in READ_TEXT and not (config.importance_data and config.importance_rows):
        raise HFTError(f"{config.score} scores the base on general text: give --importance_data, --importance_rows")
    shapes = matrices_of(model, anatomy)
    if config.granularity == "unit":
        return by_unit(anatomy, config, {name.rpartition(".")[0]: 0.0 for name in shapes})
    if config.granularity == "column":
        shapes = {name: (1, shape[1]) for name, shape in shapes.items()}

    def unknown() -> torch.Tensor:
        raise HFTError("which elements train is known once the base has been scored; run `hft importance` first")

    masks = {n: Mask(unknown, shape, round(config.fraction * math.prod(shape))) for n, shape in shapes.items()}
    return build_selection(anatomy, config, (half_of_the_norms(anatomy, config), masks))


def save_scored(folder: Path, selection: Selection, made_from: Mapping[str, Any]) -> None:
    """Write a selection as what of each parameter is frozen, True in its mask, and what it was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IMPORTANCE_NAME).unlink(missing_ok=True)
    anatomy, frozen, masks = selection.anatomy, set(selection.frozen_parameters), dict(selection.frozen_masks)
    outside = {name: (size,) for name, size in anatomy.numels.items() if name in selection.frozen_outside}
    for name, shape in (anatomy.shapes | outside).items():
        wide = (*[1] * (len(shape) - 1), shape[-1])  # whole, in as few bits as say of which model
        masks.setdefault(name, Mask.of(torch.full(wide, name in frozen)))
    save_masks(folder, masks)
    (folder / IMPORTANCE_NAME).write_text(json.dumps(made_from, indent=1) + "\n")


def matrices_of(model: nn.Module, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices of the layers, by parameter, of a model that may be on `meta`.

    Refused are those that are not linear layers' own: experts, fused projections, Conv1D.
    """
    modules, units = dict(model.named_modules()), [unit for unit in anatomy.units if unit.block != "norm"]
    if strange := [unit.name for unit in units if not isinstance(modules.get(unit.name), nn.Linear)]:
        raise HFTError(f"importance and mixout need linear layers, and {strange[0]} is not one; choose another method")
    return {part.parameter: part.shape for unit in units for part in unit.parts if len(part.shape) > 1}


def importance_scores(
    model: PreTrainedModel, anatomy: Anatomy, texts: Texts, *, score: str, granularity: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The scores of each matrix, by parameter; never more than one matrix of elements, but for Fisher.

    By unit it is the mean over the elements, or the signal-to-noise ratio; by column the sum over the rows, (1, in).
    """
    reduction, matrices = REDUCTIONS[granularity], matrices_of(model, anatomy)
    if score == "fisher":
        yield from fisher(model, matrices, texts, reduction).items()
        return
    norms = input_norms(model, matrices, texts) if score == "wanda" else {}
    for name in tqdm(matrices, desc=f"scoring by {score}", unit="matrix", leave=False):
        values = model.get_parameter(name).detach().float()
        if score == "snr":
            yield name, signal_to_noise(values)
        else:
            yield name, reduction(values.abs() * norms[name] if score == "wanda" else values.abs())


def signal_to_noise(weight: torch.Tensor) -> torch.Tensor:
    """The signal-to-noise ratio of a matrix over its largest singular value (Spectrum, 2406.06623).

    Singular values above the edge of the Marchenko-Pastur law are signal, the others noise. The noise's standard
    deviation is estimated from the interquartile range, 1.349 sigma of a normal distribution, as the authors do.
    """
    values = torch.linalg.svdvals(weight)
    quarter, three_quarters = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
    sigma = (three_quarters - quarter) / 1.349
    is_signal = values > sigma * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    noise = values[~is_signal].sum() if not is_signal.all() else 1.0
    return values[is_signal].sum() / noise / values[0]


def input_norms(model: PreTrainedModel, names: Iterable[str], texts: Texts) -> dict[str, torch.Tensor]:
    """The L2 norm of each input feature of linear layers, over all tokens (Wanda, 2306.11695, equation 1): (in,), fp32.

    SSU's released code takes another factor, the mean square of the feature.
    """
    squares: dict[str, torch.Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple) -> None:
        squares[name] = squares.get(name, 0) + inputs[0].detach().float().square().flatten(0, -2).sum(dim=0)

    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    handles = [module.register_forward_pre_hook(functools.partial(add, name)) for name, module in modules.items()]
    with torch.no_grad():
        for ids in _rows(model, texts, "measuring activations"):
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def fisher(model: PreTrainedModel, names: Iterable[str], texts: Texts, reduction: Reduction) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information: the mean over rows of text of the squared gradient of the loss.

    Squared is the gradient of each row by itself, as EWC asks (1612.00796, section 2), since signs cancel in a batch's.
    One gradient is held at a time and reduced at once; sums of elements take as much as the weights in fp32.
    """
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, parameter: nn.Parameter) -> None:
        value = reduction(parameter.grad.float().square())
        sums[name] = sums[name].add_(value) if name in sums else value
        parameter.grad = None

    model.requires_grad_(False)
    wanted = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    handles = [p.register_post_accumulate_grad_hook(functools.partial(add, name)) for name, p in wanted.items()]
    for ids in _rows(model, texts, "measuring gradients"):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: sums[name] / len(texts) for name in wanted}


def token_ids(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], max_length: int, count: int
) -> Iterator[torch.Tensor]:
    """The first `count` rows of general text as token ids, (1, length), cut to `max_length` tokens.

    A row has `text`, `messages`, or `prompt` and `completion` as messages. Chats are rendered with the tokenizer's chat
    template, or else their contents are joined. Rows of fewer than two tokens have nothing to predict and are skipped.
    """

    def ids_of(row: Mapping[str, Any]) -> list[int]:
        cut = {"truncation": True, "max_length": max_length}
        if "text" in row:
            return tokenizer(row["text"], **cut)["input_ids"]
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        if tokenizer.chat_template:  # which brings its own special tokens
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            return tokenizer(text, add_special_tokens=False, **cut)["input_ids"]
        return tokenizer("\n\n".join(message["content"] for message in messages), **cut)["input_ids"]

    def usable() -> Iterator[torch.Tensor]:
        for row in rows:
            try:
                ids = ids_of(row)
            except (TemplateError, ValueError, TypeError, LookupError) as error:
                why = f"a row of the text to score by cannot be used, {reason(error)}: it has {', '.join(row)}"
                raise HFTError(f"{why}; give text, messages, or prompt and completion as messages") from error
            if len(ids) > 1:
                yield torch.tensor([ids])

    return itertools.islice(usable(), count)


def _rows(model: PreTrainedModel, texts: Texts, description: str) -> Iterator[torch.Tensor]:
    """The texts on the model's device, with the model set to evaluate."""
    if not texts:
        raise HFTError("no text to score by; give rows of general text")
    model.eval()
    return (ids.to(model.device) for ids in tqdm(texts, desc=description, unit="row", leave=False))
