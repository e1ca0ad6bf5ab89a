"""What models are compared by: a score or the mean of some, over runs that differ only in their seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hft.record.scores import Score, SuiteScores

Key = tuple[str, str, str]  # suite, task and metric of a score


@dataclass(frozen=True)
class Column:
    """A score, or the mean of several."""

    keys: tuple[Key, ...]
    label: str  # in a table of its suite
    unit: str = "%"
    higher_is_better: bool = True

    @property
    def suite(self) -> str:
        return self.keys[0][0]

    @property
    def name(self) -> str:
        """The label outside its suite's tables."""
        return self.label if len(self.keys) == 1 else f"{self.suite}, {self.label}"


@dataclass(frozen=True)
class Measured:
    """What some runs scored."""

    value: float  # the mean over the runs
    spread: float | None  # the sample standard deviation over the runs; of one run its standard error, if known
    n: int  # number of runs
    partial: bool = False  # whether any of them was scored with --limit


def parts_of(keys: Sequence[Key], scores: Mapping[str, SuiteScores]) -> list[Score]:
    """A model's scores, given by suite, under some keys; empty unless all are there."""
    found = [scores[suite].find(task, metric) if suite in scores else None for suite, task, metric in keys]
    return [] if None in found else found


def mean_of(parts: Sequence[Score]) -> tuple[float, float | None]:
    """The mean of independent scores and its standard error, None if that of a score is not known."""
    errors = [part.stderr for part in parts]
    error = None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors)
    return statistics.fmean(part.value for part in parts), error


def measure(keys: Sequence[Key], runs: Iterable[Mapping[str, SuiteScores]]) -> Measured | None:
    """The mean of the scores under some keys over the runs that have all of them; None if none has."""
    scored = [(scores, parts) for scores in runs if (parts := parts_of(keys, scores))]
    partial = any(scores[suite].of(task).settings.get("limit") for scores, _ in scored for suite, task, _ in keys)
    return summarize([mean_of(parts) for _, parts in scored], partial=partial)


def summarize(numbers: Sequence[tuple[float, float | None]], *, partial: bool = False) -> Measured | None:
    """The values of some runs, each with its standard error, as one number; None for no runs."""
    if not numbers:
        return None
    values = [value for value, _ in numbers]
    spread = statistics.stdev(values) if len(values) > 1 else numbers[0][1]
    return Measured(statistics.fmean(values), spread, len(values), partial)
