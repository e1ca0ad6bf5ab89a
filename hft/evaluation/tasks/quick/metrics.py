"""What the quick tasks measure in a row."""

import math


def choice(doc, results) -> dict[str, float]:
    """Of a question with k candidates: whether the right one is the most likely; the same with chance at 0; and its
    loss, the cross-entropy in nats among the candidates."""
    scores = [likelihood for likelihood, _ in results]
    label, top = doc["label"], max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    correct, chance = float(scores.index(top) == label), 1 / len(scores)
    return {"acc": correct, "acc_centered": (correct - chance) / (1 - chance), "choice_loss": total - scores[label]}


def per_token(doc, results) -> float:
    """Minus the mean over a row's tokens of what the model returns for the row: nats per token."""
    ((total, _),) = results
    return -total / doc["tokens"]


def loss(doc, results) -> dict[str, float]:
    return {"loss": per_token(doc, results)}


def kl(doc, results) -> dict[str, float]:
    return {"kl": per_token(doc, results)}
