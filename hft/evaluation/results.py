"""What lm-eval returns, read: scores, the rows behind them, and prompts that did not fit."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from hft.errors import HFTError
from hft.evaluation.suites import METRIC_UNITS, Benchmark
from hft.record.identity import digest
from hft.record.scores import Score

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from pandas import DataFrame

Results = dict[str, Any]  # of `lm_eval.evaluate`
Samples = list[dict[str, Any]]  # of a question, one for each filter


class Metric(NamedTuple):
    """A number of a task: our name, lm-eval's, the filter of its answers, and the unit with the factor to it."""

    name: str
    base: str
    kind: str
    unit: str
    scale: float
    higher_is_better: bool


def read_results(benchmark: Benchmark, results: Results) -> tuple[list[Score], DataFrame]:
    """lm-eval's numbers under our names, fractions as percentages, and the rows behind them in the same units."""
    import pandas as pd

    scores, rows = [], []
    roots = _roots(results)
    names = {roots[0]: benchmark.name} if len(roots) == 1 else {root: root for root in roots}
    names |= {task: name for name, task in benchmark.parts.items()}
    for task, name in names.items():
        leaves, values, metrics = _leaves(task, results), results["results"][task], _metrics(benchmark, results, task)
        n = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
        for one in metrics:
            error = values.get(f"{one.base}_stderr,{one.kind}")
            stderr = None if error in (None, "N/A") else one.scale * error
            value = one.scale * values[f"{one.base},{one.kind}"]
            scores.append(Score(name, one.name, value, stderr, n, one.unit, one.higher_is_better))
        for leaf in leaves if task in roots else ():
            questions: dict[Any, Samples] = {}
            for sample in results["samples"][leaf]:
                questions.setdefault(sample["doc_id"], []).append(sample)
            for samples in questions.values():
                row = {"row": digest(samples[0]["doc_hash"])[:16], "task": names.get(leaf, leaf)}
                row |= {one.name: _value(one, samples) for one in metrics}
                rows.append(row | {"answer": _answer(samples[0])})
    made = pd.DataFrame(rows)
    again = made.groupby("row").cumcount()  # a question that stands there twice
    return scores, made.assign(row=made["row"].where(again == 0, made["row"] + "-" + again.astype(str)))


def check_finite(name: str, results: Results) -> None:
    """Refuse what a model computed without numbers; a choice among NaN would look like a score."""
    for leaf, samples in results["samples"].items():
        answers = (response for sample in samples for each in sample["resps"] for response in each)
        if any(math.isnan(one[0]) for one in answers if isinstance(one, tuple)):
            raise HFTError(f"{name} cannot be scored: the model's log-likelihoods of {leaf} are NaN")


def count_truncated(lm: LM, results: Results) -> int:
    """How many rows have a prompt that is longer than the model's context; lm-eval cuts them from the left."""
    length = getattr(lm, "max_length", None)
    if length is None:  # an engine that counts no tokens
        return 0

    cut = set()
    for leaf, samples in results["samples"].items():
        for sample in samples:
            for prompt, second, *_ in (arguments for arguments in sample["arguments"] if len(arguments) > 1):
                if isinstance(second, str):
                    text, room = prompt + second, length + 1
                else:
                    text, room = prompt, length - int(second.get("max_gen_toks", lm.max_gen_toks))
                if len(text.encode()) > room and len(lm.tok_encode(text)) > room:  # a token is a byte or more
                    cut.add((leaf, sample["doc_id"]))
    return len(cut)


def _roots(results: Results) -> list[str]:
    """The tasks or groups with a score that no other such holds."""

    def scored(task: str) -> list[str]:
        members = results["group_subtasks"].get(task)
        if not members or any(_is_score(*item) for item in results["results"][task].items()):
            return [task]
        return [one for member in members for one in scored(member)]

    inside = {name for names in results["group_subtasks"].values() for name in names}
    return [one for task in results["results"] if task not in inside for one in scored(task)]


def _metrics(benchmark: Benchmark, results: Results, task: str) -> list[Metric]:
    """A benchmark's metrics; of a task that is in no suite all that lm-eval computed, or the one asked for."""
    if benchmark.metrics:
        units = {name: (unit, 1, False) for name, unit in METRIC_UNITS.items()}
        named = benchmark.metrics.items()
        return [Metric(name, *key.split(","), *units.get(name, ("%", 100, True))) for name, key in named]
    known = [key for key, value in results["results"][task].items() if _is_score(key, value)]
    keys = [key for key in known if benchmark.only in (None, key.split(",")[0])]
    if not keys:
        raise HFTError(f"{task} has no metric {benchmark.only}, only {', '.join(known)}")
    samples, found = [row for leaf in _leaves(task, results) for row in results["samples"][leaf]], []
    for base, kind in (key.split(",") for key in keys):
        values = [row.get(base) for row in samples if row["filter"] == kind]
        upward = bool(results["higher_is_better"].get(task, {}).get(base, True))
        is_fraction = upward and all(
            isinstance(one, Real) and 0 <= one <= 1 for each in values for one in _listed(each)
        )
        name = base if kind == "none" else f"{base},{kind}"
        found.append(Metric(name, base, kind, *(("%", 100) if is_fraction else ("", 1)), upward))
    return found


def _leaves(task: str, results: Results) -> list[str]:
    members = results["group_subtasks"].get(task)
    return [leaf for member in members for leaf in _leaves(member, results)] if members else [task]


def _is_score(key: str, value: object) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, Real)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(metric: Metric, samples: Samples) -> float | None:
    """Of a question; of several values, such as one per instruction, their mean; None for what has no mean."""
    values = _listed(next((sample.get(metric.base) for sample in samples if sample["filter"] == metric.kind), None))
    is_number = values and all(isinstance(each, Real) for each in values)
    return metric.scale * float(sum(values) / len(values)) if is_number else None


def _answer(sample: dict[str, Any]) -> Any:
    """What the model wrote, or the candidate that it finds most likely; None for the likelihood of one text."""
    responses = sample["resps"]
    if isinstance(responses[0][0], str):
        return responses[0][0] if len(responses[0]) == 1 else list(responses[0])
    if len(responses) == 1:
        return None
    likelihoods = [response[0][0] for response in responses]
    return sample["arguments"][likelihoods.index(max(likelihoods))][1].strip()
