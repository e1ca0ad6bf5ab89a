"""What a model knows, row by row: rows with a right answer, questions with candidates, texts; and what comes back."""

from __future__ import annotations

import copy
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


def scored(model: nn.Module, rows: list[tuple[list[int], int]]) -> Iterator[tuple[int, float, bool, torch.Tensor]]:
    """Of each row its index, its loss in nats, whether each token is the likeliest, and their distributions (log).

    The shortest rows come first, so that little is padded.
    """
    order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))
    for batch in batched(order, max(1, TOKENS // len(rows[order[-1]][0]))):
        width = len(rows[batch[-1]][0])
        padded = torch.tensor([rows[n][0] + [0] * (width - len(rows[n][0])) for n in batch])  # right: causal, no mask
        with torch.no_grad():
            logits = model.eval()(input_ids=padded.to(model.device)).logits.cpu()
        for n, its in zip(batch, logits, strict=True):
            ids, begins = rows[n]
            targets = torch.tensor(ids[begins:])
            log_p = its[begins - 1 : len(ids) - 1].float().log_softmax(-1)
            loss = -log_p.gather(1, targets[:, None]).sum().item()
            yield n, loss, bool((log_p.argmax(-1) == targets).all()), log_p


def answers(rows: list[Row]) -> list[tuple[list[int], int]]:
    return [(ids, row.begins) for row in rows for ids in (row.ids, *row.others)]


Before = dict[int, tuple[float, torch.Tensor]]  # what the start model gives each row: its loss, its distributions


def before(start: nn.Module, rows: list[Row]) -> Before:
    return {n: (loss, log_p) for n, loss, _, log_p in scored(start, answers(rows))}


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) in nats per token."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def measure(model: nn.Module, rows: Rows, start: dict[str, Before] | None = None) -> dict[str, list[float]]:
    """Per row of each kind: `right` (0 or 1), `loss` and, where the start model's distributions are given, `kl`.

    Right is what greedy decoding would answer exactly, or the candidate of the lowest loss. Losses of answers and
    texts are in nats per token, those of candidates are cross-entropies among them; KL(start || model) per token.
    """
    found: dict[str, list[float]] = {}
    for kind, its in rows.items():
        if its[0].others:
            losses = torch.empty(len(answers(its)))
            for n, loss, *_ in scored(model, answers(its)):
                losses[n] = loss
            losses = losses.view(len(its), -1)
            found[f"{kind}.right"] = (losses.argmin(1) == 0).float().tolist()
            found[f"{kind}.loss"] = (losses[:, 0] + (-losses).logsumexp(1)).tolist()
            continue
        names = ("right", "loss", "kl") if start is not None else ("right", "loss")
        columns = {name: [0.0] * len(its) for name in names}
        for n, loss, right, q in scored(model, answers(its)):
            columns["right"][n], columns["loss"][n] = float(right), loss / len(q)
            if start is not None:
                columns["kl"][n] = divergence(start[kind][n][1], q)
        found |= {f"{kind}.{name}": values for name, values in columns.items()}
    return found


def preferences(model: nn.Module, pairs: list[Row], start: Before) -> dict[str, list[float]]:
    """Per pair, a chosen answer and in `others` the rejected one: what DPO learns, relative to the start model.

    `margin` is how much more likely the chosen one became than the rejected one, in nats; `right` is 1 if that is more
    than 0 and 0.5 if it is 0; `kl` is KL(start || model) in nats per token of both answers.
    """
    gains, kls = [0.0] * len(start), [0.0] * len(start)
    for n, loss, _, q in scored(model, answers(pairs)):
        gains[n], kls[n] = start[n][0] - loss, divergence(start[n][1], q)
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
