"""Differences between models that answered the same rows, with their noise over rows and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Difference:
    """How much more one model, or group of models that differ in seed, has than another, on the same rows."""

    mean: float  # in the metric's unit
    se: float  # over rows and seeds
    df: float  # of the t distribution that the interval is made from
    rows: int
    seeds: int  # of the smaller group
    p: float  # of a difference at least as large if there were none
    gained: int | None = None  # rows that were wrong and are right now; None unless each row is right or wrong
    lost: int | None = None  # rows that were right and are wrong now

    @property
    def interval(self) -> tuple[float, float]:
        """At 95% confidence."""
        half = stats.t.ppf((1 + CONFIDENCE) / 2, self.df) * self.se
        return self.mean - half, self.mean + half

    @property
    def detectable(self) -> float:
        """The difference that these rows and seeds show in 80% of experiments."""
        return (stats.t.ppf((1 + CONFIDENCE) / 2, self.df) + stats.t.ppf(POWER, self.df)) * self.se

    @property
    def told_apart(self) -> bool:
        low, high = self.interval
        return not low <= 0 <= high


def difference(before: np.ndarray, after: np.ndarray, *, matched: bool = False) -> Difference:
    """Compare two groups of models on the rows that all of them answered.

    The variance is that of the mean over rows plus that of the mean over seeds, so that neither more rows nor more
    seeds alone makes a difference sure. It counts their interaction twice, on the safe side; what the pigeonhole
    bootstrap (Owen 2007, arXiv 0712.1111) resamples has the same variance. The degrees of freedom are Satterthwaite's.
    With one seed per group this is the paired t-test, and for right and wrong answers `p` is McNemar's exact test.

    Args:
        before, after: one value per seed and row, of shape (seeds, rows).
        matched: seed i of one group saw the same batches as seed i of the other, so that seeds are paired too.
    """
    rows = before.shape[1]
    by_row = after.mean(0) - before.mean(0)
    means = [group.mean(1) for group in (before, after)]
    per_seed = [means[1] - means[0]] if matched else means
    parts = [(by_row.var(ddof=1) / rows, rows - 1)]
    parts += [(values.var(ddof=1) / len(values), len(values) - 1) for values in per_seed if len(values) > 1]
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else rows - 1
    mean, se = by_row.mean(), variance**0.5
    gained = lost = None
    p = 2 * stats.t.sf(abs(mean) / se, df) if se else float(mean == 0)
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all() and len(before) == len(after) == 1:
        gained, lost = int((after > before).sum()), int((after < before).sum())
        p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(mean, se, df, rows, min(len(before), len(after)), p, gained, lost)
