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


def loss(doc, results) -> dict[str, float]:
    """Nats per token of a text."""
    ((total, _),) = results
    return {"loss": -total / doc["tokens"]}


def answer_loss(doc, results) -> dict[str, float]:
    ((mean, _),) = results
    return {"loss": mean}


def kl(doc, results) -> dict[str, float]:
    ((mean, _),) = results
    return {"kl": mean}
