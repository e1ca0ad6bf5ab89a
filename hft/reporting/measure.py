"""What models are compared by: a score or the mean of some, over runs that differ only in their seeds."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hft.record.scores import Score, Scores, SuiteScores

Key = tuple[str, str, str]  # suite, task and metric of a score
NAMES = ("base", "task_data", "data")  # settings that name what other parts of a score's record hold by content
BY_DIGEST = ("rows", "benchmark", "kl_base")
# What numbers may differ in: the tasks of a mean, and models of which the rows that both answered are compared.
OF_A_TASK = (*BY_DIGEST, "protocol", "paper_subsets")
CHOOSE_ROWS = ("limit", "paper_subsets")


@dataclass(frozen=True)
class Column:
    """A score, or the mean of several."""

    keys: tuple[Key, ...]
    label: str  # in a table of its suite
    unit: str = "%"
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """The label outside its suite's tables."""
        return self.label if len(self.keys) == 1 else f"{self.keys[0][0]}, {self.label}"


@dataclass(frozen=True)
class Measured:
    """What some runs scored."""

    value: float  # the mean over the runs
    spread: float | None  # the sample standard deviation over the runs; of one run its standard error, if known
    n: int  # number of runs
    conditions: Mapping[str, Any] = field(default_factory=dict)  # under which they all were scored

    @property
    def shortened(self) -> list[str]:
        """The settings that make it another measurement than the benchmark's."""
        return [f"{key} {self.conditions[key]}" for key in ("limit", "max_gen_toks") if self.conditions.get(key)]

    @property
    def bar(self) -> float:
        return self.spread if self.n > 1 else 0

    def text(self, digits: int) -> str:
        """`12.3 ± 0.4`, the spread only over several runs."""
        return f"{self.value:,.{digits}f}" + (f" ± {self.spread:,.{digits}f}" if self.n > 1 else "")


def conditions_of(scores: Scores, but: Collection[str] = ()) -> dict[str, Any]:
    """How scores were measured, but for some of it; equal for numbers that may be compared."""
    known = scores.settings | scores.versions | {"dtype": scores.dtype, "rows": scores.data}
    known |= {key: scores.inputs.get(key) for key in ("benchmark", "kl_base")}
    return {key: value for key, value in known.items() if key not in (*NAMES, *but)}


def conditions_that_differ(first: Scores, other: Scores, but: Collection[str] = ()) -> list[str]:
    alone = first.versions.keys() ^ other.versions.keys()  # packages that only one model needs, such as peft
    one, two = (conditions_of(scores, {*but, *alone}) for scores in (first, other))
    differ = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    return [key if key in BY_DIGEST else f"{key} {one.get(key)} and {two.get(key)}" for key in differ]


def parts_of(keys: Sequence[Key], scores: Mapping[str, SuiteScores]) -> list[tuple[Scores, Score]]:
    """A model's scores, given by suite, under some keys, with what they depend on; empty unless all are there."""
    found = [
        (one, one.find(task, metric))
        for suite, task, metric in keys
        if suite in scores and (one := scores[suite].of(task, metric))
    ]
    return found if len(found) == len(keys) else []


def mean_of(parts: Sequence[tuple[Scores, Score]]) -> tuple[float, float | None]:
    """The mean of independent scores and its standard error, None if that of a score is not known."""
    errors = [score.stderr for _, score in parts]
    error = None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors)
    return statistics.fmean(score.value for _, score in parts), error


def unlike(keys: Sequence[Key], runs: Iterable[Mapping[str, SuiteScores]]) -> list[str]:
    """The conditions that forbid a mean: those in which a run's tasks differ, or a task's runs."""
    found = [[one for one, _ in parts] for scores in runs if (parts := parts_of(keys, scores))]
    tasks = [conditions_that_differ(run[0], other, OF_A_TASK) for run in found for other in run[1:]]
    seeds = [conditions_that_differ(*pair) for run in found[1:] for pair in zip(found[0], run, strict=True)]
    return list(dict.fromkeys(one for each in (*tasks, *seeds) for one in each))


def measure(keys: Sequence[Key], runs: Sequence[Mapping[str, SuiteScores]]) -> Measured | None:
    """The mean of the scores under some keys over the runs that have all; None if none has, or they are `unlike`."""
    found = [parts for scores in runs if (parts := parts_of(keys, scores))]
    if not found or unlike(keys, runs):
        return None
    return summarize(map(mean_of, found), conditions_of(found[0][0][0], OF_A_TASK))


def summarize(runs: Iterable[tuple[float, float | None]], under: Mapping[str, Any] | None = None) -> Measured | None:
    """The values of some runs, each with its standard error, as one number; None for no runs."""
    if not (numbers := list(runs)):
        return None
    values = [value for value, _ in numbers]
    spread = statistics.stdev(values) if len(values) > 1 else numbers[0][1]
    return Measured(statistics.fmean(values), spread, len(values), under or {})
