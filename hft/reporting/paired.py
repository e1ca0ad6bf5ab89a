"""Differences between models that answered the same rows, with their noise over rows and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Difference:
    """How much more one model, or group of models that differ in seed, has than another, on the same rows."""

    before: float  # means, in the metric's unit
    after: float
    se: float  # of their difference, over rows and seeds
    df: float  # of the t distribution that the interval is made from
    rows: int
    seeds: tuple[int, int]
    p: float  # of a difference at least as large if there were none
    gained: int | None = None  # rows that went up; None unless each has one of two values, such as right or wrong
    lost: int | None = None

    @property
    def mean(self) -> float:
        return self.after - self.before

    @property
    def interval(self) -> tuple[float, float]:
        """At 95% confidence."""
        return stats.t.interval(CONFIDENCE, self.df, self.mean, self.se) if self.se else (self.mean, self.mean)

    @property
    def detectable(self) -> float:
        """The difference that these rows and seeds show in 80% of experiments."""
        return (stats.t.ppf((1 + CONFIDENCE) / 2, self.df) + stats.t.ppf(POWER, self.df)) * self.se

    @property
    def told_apart(self) -> bool:
        return self.p < 1 - CONFIDENCE


def difference(before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, matched: bool = False) -> Difference:
    """Compare two groups of models on the rows of a task, or on the mean of several tasks.

    The variance is that of the mean over rows plus that of the mean over seeds, so that neither more rows nor more
    seeds alone makes a difference sure. It counts their interaction twice, on the safe side; what the pigeonhole
    bootstrap (Owen 2007, arXiv 0712.1111) resamples has the same variance. The degrees of freedom are Satterthwaite's.
    With one seed per group this is the paired t-test, and for right and wrong answers `p` is McNemar's exact test.

    Args:
        before, after: for each task the values, of shape (seeds, rows). Rows of tasks are independent, seeds shared.
        matched: seed i of one group saw the same batches as seed i of the other, so that seeds are paired too.
    """
    by_row = [new.mean(0) - old.mean(0) for old, new in zip(before, after, strict=True)]
    models = [np.mean([task.mean(1) for task in group], axis=0) for group in (before, after)]
    per_seed = [models[1] - models[0]] if matched else models
    parts = [(row.var(ddof=1) / len(row) / len(by_row) ** 2, len(row) - 1) for row in by_row]
    parts += [(values.var(ddof=1) / len(values), len(values) - 1) for values in per_seed if len(values) > 1]
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else parts[0][1]
    means, se = [model.mean() for model in models], variance**0.5
    seeds = len(models[0]), len(models[1])
    p = 2 * stats.t.sf(abs(means[1] - means[0]) / se, df) if se else float(means[1] == means[0])
    gained = lost = None
    if len(by_row) == 1 and seeds == (1, 1) and len(np.unique([before[0], after[0]])) <= 2:
        gained, lost = int((by_row[0] > 0).sum()), int((by_row[0] < 0).sum())
        p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(*means, se, df, sum(map(len, by_row)), seeds, p, gained, lost)
