"""What lm-eval returns, read: scores, the rows behind them, and prompts that did not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError
from hft.evaluation.suites import METRIC_UNITS, Benchmark
from hft.record.identity import digest
from hft.record.scores import Score

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from pandas import DataFrame

Results = dict[str, Any]  # of `lm_eval.evaluate`


@dataclass(frozen=True)
class Metric:
    """A number of a task: our name, lm-eval's, the filter of its answers, and the unit with the factor to it."""

    name: str
    base: str
    kind: str
    unit: str = "%"
    scale: float = 100
    higher_is_better: bool = True

    def of_row(self, samples: list[dict[str, Any]]) -> float | None:
        """Its value on a question; of several, such as one per instruction, their mean; None for what has no mean."""
        value = next((sample.get(self.base) for sample in samples if sample["filter"] == self.kind), None)
        if isinstance(value, list) and value and all(isinstance(each, Real) for each in value):
            value = sum(value) / len(value)
        return self.scale * float(value) if isinstance(value, Real) else None


def scores_of_results(benchmark: Benchmark, results: Results) -> list[Score]:
    """lm-eval's numbers under our names, fractions as percentages."""
    scores = []
    for task, name in (names_of(benchmark, results) | {task: name for name, task in benchmark.parts.items()}).items():
        n = sum(results["n-samples"][leaf]["effective"] for leaf in _leaves(task, results))
        values = results["results"][task]
        for one in metrics_of(benchmark, results, task):
            error = values.get(f"{one.base}_stderr,{one.kind}")
            stderr = None if error in (None, "N/A") else one.scale * error
            value = one.scale * values[f"{one.base},{one.kind}"]
            scores.append(Score(name, one.name, value, stderr, n, one.unit, one.higher_is_better))
    return scores


def rows_of_results(benchmark: Benchmark, results: Results) -> DataFrame:
    """The rows behind the scores, in the units of the scores (`hft.record.scores.rows_of`)."""
    import pandas as pd

    rows = []
    names = names_of(benchmark, results) | {task: name for name, task in benchmark.parts.items()}
    for root in names_of(benchmark, results):
        metrics = metrics_of(benchmark, results, root)
        for leaf in _leaves(root, results):
            for samples in _by_question(results["samples"][leaf]):
                row = {"row": digest(samples[0]["doc_hash"])[:16], "task": names.get(leaf, leaf)}
                rows.append(row | {one.name: one.of_row(samples) for one in metrics} | {"answer": _answer(samples[0])})
    made = pd.DataFrame(rows)
    again = made.groupby("row").cumcount()  # a question that stands there twice
    return made.assign(row=made["row"].where(again == 0, made["row"] + "-" + again.astype(str)))


def check_finite(benchmark: Benchmark, results: Results) -> None:
    """Refuse what a model computed without numbers; a choice among NaN would look like a score."""
    for leaf, samples in results["samples"].items():
        answers = (response for sample in samples for each in sample["resps"] for response in each)
        if any(math.isnan(one[0]) for one in answers if isinstance(one, tuple)):
            raise HFTError(f"{benchmark.name} cannot be scored: the model's log-likelihoods of {leaf} are NaN")


def count_truncated(lm: LM, results: Results) -> int:
    """How many rows have a prompt that is longer than the model's context; lm-eval cuts them from the left."""
    length = getattr(lm, "max_length", None)
    if length is None:  # an engine that counts no tokens
        return 0

    def is_cut(prompt: str, second: str | Mapping[str, Any]) -> bool:
        if isinstance(second, str):
            text, room = prompt + second, length + 1
        else:
            text, room = prompt, length - int(second.get("max_gen_toks", lm.max_gen_toks))
        return len(text.encode()) > room and len(lm.tok_encode(text)) > room  # a token is a byte or more

    questions = (samples[0] for leaf in results["samples"].values() for samples in _by_question(leaf))
    return sum(any(is_cut(*arguments[:2]) for arguments in one["arguments"] if len(arguments) > 1) for one in questions)


def names_of(benchmark: Benchmark, results: Results) -> dict[str, str]:
    """The tasks or groups with a score of their own that no other such holds, and our names of them."""

    def scored(task: str) -> list[str]:
        members = results["group_subtasks"].get(task)
        if not members or any(_is_score(*item) for item in results["results"][task].items()):
            return [task]
        return [one for member in members for one in scored(member)]

    inside = {name for names in results["group_subtasks"].values() for name in names}
    found = [one for task in results["results"] if task not in inside for one in scored(task)]
    return {found[0]: benchmark.name} if len(found) == 1 else {task: task for task in found}


def metrics_of(benchmark: Benchmark, results: Results, task: str) -> list[Metric]:
    """A benchmark's metrics; of a task that is in no suite all that lm-eval computed, or the one asked for."""
    if benchmark.is_ours:
        units = {name: (METRIC_UNITS[name], 1, False) for name in METRIC_UNITS}
        return [Metric(name, *key.split(","), *units.get(name, ())) for name, key in benchmark.metrics.items()]
    known = [key for key, value in results["results"][task].items() if _is_score(key, value)]
    keys = [key for key in known if not benchmark.metrics or key.split(",")[0] in benchmark.metrics]
    if not keys:
        raise HFTError(f"{task} has no metric {', '.join(benchmark.metrics)}, only {', '.join(known)}")
    better, found = results["higher_is_better"].get(task, {}), []
    for base, kind in (key.split(",") for key in keys):
        leaves = [results["samples"][leaf] for leaf in _leaves(task, results)]
        rows = [row.get(base) for leaf in leaves for row in leaf if row["filter"] == kind]
        values = [value for row in rows for value in (row if isinstance(row, list) else [row])]
        upward = bool(better.get(base, True))
        is_fraction = upward and all(isinstance(value, Real) and 0 <= value <= 1 for value in values)
        name = base if kind == "none" else f"{base},{kind}"
        found.append(Metric(name, base, kind, *(("%", 100) if is_fraction else ("", 1)), upward))
    return found


def _leaves(task: str, results: Results) -> list[str]:
    members = results["group_subtasks"].get(task)
    return [leaf for member in members for leaf in _leaves(member, results)] if members else [task]


def _is_score(key: str, value: object) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, Real)


def _by_question(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The samples of each question, one for each filter."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    return list(found.values())


def _answer(sample: Mapping[str, Any]) -> Any:
    """What the model wrote, or the candidate that it finds most likely; None for the likelihood of one text."""
    responses = sample["resps"]
    if isinstance(responses[0][0], str):
        return responses[0][0] if len(responses[0]) == 1 else list(responses[0])
    if len(responses) == 1:
        return None
    likelihoods = [response[0][0] for response in responses]
    return sample["arguments"][likelihoods.index(max(likelihoods))][1].strip()
