"""What a model knows, row by row: rows with a right answer, questions with candidates, texts; and what comes back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

TOKENS = 4096  # of a batch, with padding


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `begins` on are scored; with candidates, they are one of several ends."""

    ids: list[int]
    begins: int
    others: list[list[int]] = field(default_factory=list)  # whole rows with the other candidates


Rows = dict[str, list[Row]]  # by what they ask for


def batched(rows: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def scored(model: nn.Module, rows: list[tuple[list[int], int]]) -> Iterator[tuple[float, bool, torch.Tensor]]:
    """Of each row the loss of its tokens in nats, whether each is the likeliest, and their distributions (log)."""
    width = max(len(ids) for ids, _ in rows)
    for batch in batched(rows, max(1, TOKENS // width)):
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])  # on the right: causal, no mask
        with torch.no_grad():
            logits = model(input_ids=padded.to(model.device)).logits.cpu()
        for (ids, begins), its in zip(batch, logits, strict=True):
            targets = torch.tensor(ids[begins:])
            log_p = its[begins - 1 : len(ids) - 1].float().log_softmax(-1)
            loss = -log_p.gather(1, targets[:, None]).sum().item()
            yield loss, bool((log_p.argmax(-1) == targets).all()), log_p


def measure(model: nn.Module, rows: Rows, start: nn.Module | None = None) -> dict[str, list[float]]:
    """Per row of each kind: `right` (0 or 1), `loss` and, with the model that training started from, `kl`.

    Right is what greedy decoding would answer exactly, or the candidate of the lowest loss. Losses of answers and
    texts are in nats per token, those of candidates are cross-entropies among them; KL(start || model) per token.
    """
    model.eval()
    found: dict[str, list[float]] = {}
    for kind, its in rows.items():
        if its[0].others:
            width = 1 + len(its[0].others)
            flat = [(ids, row.begins) for row in its for ids in (row.ids, *row.others)]
            losses = torch.tensor([loss for loss, *_ in scored(model, flat)]).view(-1, width)
            found[f"{kind}.right"] = (losses.argmin(1) == 0).float().tolist()
            found[f"{kind}.loss"] = (losses[:, 0] + (-losses).logsumexp(1)).tolist()
            continue
        flat = [(row.ids, row.begins) for row in its]
        columns: dict[str, list[float]] = {"right": [], "loss": []} | ({"kl": []} if start is not None else {})
        before = scored(start.eval(), flat) if start is not None else itertools.repeat(None)
        for (loss, right, q), reference in zip(scored(model, flat), before, strict=False):
            columns["right"].append(float(right))
            columns["loss"].append(loss / len(q))
            if reference is not None:
                p = reference[2]
                columns["kl"].append((p.exp() * (p - q)).sum(-1).mean().item())
        found |= {f"{kind}.{name}": values for name, values in columns.items()}
    return found


def preferences(model: nn.Module, pairs: list[Row], start: nn.Module) -> dict[str, list[float]]:
    """Per pair, a chosen answer and in `others` the rejected one: what DPO learns, relative to the start model.

    `margin` is how much more likely the chosen one became than the rejected one, in nats; `right` is 1 if that is more
    than 0 and 0.5 if it is 0; `kl` is KL(start || model) in nats per token of both answers.
    """
    flat = [(ids, row.begins) for row in pairs for ids in (row.ids, *row.others)]
    gains, kls = [], []
    for (loss, _, q), (before, _, p) in zip(scored(model.eval(), flat), scored(start.eval(), flat), strict=True):
        gains.append(before - loss)
        kls.append((p.exp() * (p - q)).sum(-1).mean().item())
    margins = [chosen - rejected for chosen, rejected in zip(gains[::2], gains[1::2], strict=True)]
    return {
        "pairs.right": [(margin > 0) + 0.5 * (margin == 0) for margin in margins],
        "pairs.margin": margins,
        "pairs.kl": [(a + b) / 2 for a, b in zip(kls[::2], kls[1::2], strict=True)],
    }


def between(start: nn.Module, model: nn.Module, alpha: float) -> nn.Module:
    """A model at start + alpha x (model - start)."""
    found = copy.deepcopy(start)
    with torch.no_grad():
        for name, value in found.named_parameters():
            value.lerp_(model.get_parameter(name), alpha)
    return found


def distance(model: nn.Module, start: nn.Module) -> dict[str, float]:
    """How far the weights moved, relative to their norm: of the whole model, and of each kind of parameter."""
    moved: dict[str, list[torch.Tensor]] = {}
    for name, value in start.named_parameters():
        pair = torch.stack([(model.get_parameter(name) - value).float().square().sum(), value.float().square().sum()])
        for kind in ("all", name.split(".")[-2]):
            moved.setdefault(kind, []).append(pair.detach())
    return {kind: (sum(pairs)[0] / sum(pairs)[1]).sqrt().item() for kind, pairs in moved.items()}


def recovered(model: nn.Module, examples: list[Row], rows: Rows, steps: int, learning_rate: float) -> Rows:
    """What a copy of a model answers after a few full-batch steps on ten examples of the old task."""
    model = copy.deepcopy(model).train().requires_grad_(True)  # a merged adapter's base is frozen
    width = max(len(row.ids) for row in examples)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in examples])
    labels = torch.full_like(ids, -100)
    for target, row in zip(labels, examples, strict=True):
        target[row.begins : len(row.ids)] = torch.tensor(row.ids[row.begins :])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {f"recovered.{key}": values for key, values in measure(model, rows).items()}
