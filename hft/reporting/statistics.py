"""Differences on the same rows with their noise over rows and seeds, and what is kept beside what is learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.8
DRAWS = 1000  # of an interval over resampled rows and seeds


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
    interval: tuple[float, float]  # at 95% confidence
    gained: int | None = None  # rows that went up; None unless each has one of two values, such as right or wrong
    lost: int | None = None

    @property
    def mean(self) -> float:
        return self.after - self.before

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
    With one seed per group this is the paired t-test, and McNemar's exact one for right and wrong answers.

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
    shift = means[1] - means[0]
    seeds = len(models[0]), len(models[1])
    p = 2 * stats.t.sf(abs(shift) / se, df) if se else float(not shift)
    interval = stats.t.interval(CONFIDENCE, df, shift, se) if se else (shift, shift)
    gained = lost = None
    if len(by_row) == 1 and seeds == (1, 1) and len(np.unique([before[0], after[0]])) <= 2:
        gained, lost = int((by_row[0] > 0).sum()), int((by_row[0] < 0).sum())
        if gained + lost:
            test = stats.binomtest(gained, gained + lost)
            p, changed = test.pvalue, abs(by_row[0]).mean()  # the difference if all of them went up
            interval = tuple(changed * (2 * end - 1) for end in test.proportion_ci(CONFIDENCE))
    return Difference(*means, se, df, sum(map(len, by_row)), seeds, p, interval, gained, lost)


@dataclass(frozen=True)
class Curve:
    """One method in the order of its learning rates; more is better on both axes. Curves share their rows and seeds."""

    learned: np.ndarray  # of shape (rates, seeds, rows)
    kept: np.ndarray  # of shape (rates, seeds, rows)
    same_rows: bool = False  # both are of the same rows, and not of those of two tasks

    def points(self, seeds: np.ndarray, learned_rows: np.ndarray, kept_rows: np.ndarray) -> np.ndarray:
        """Learned and kept per rate, of shape (draws, rates, 2), with weights of shape (draws, seeds or rows)."""
        pairs = ((self.learned, learned_rows), (self.kept, kept_rows))
        axes = [np.einsum("asr,ds,dr->da", values, seeds, rows, optimize=True) for values, rows in pairs]
        return np.stack(axes, axis=-1)

    @property
    def mean_points(self) -> np.ndarray:
        return np.stack([self.learned.mean((1, 2)), self.kept.mean((1, 2))], axis=1)


class Estimate(NamedTuple):
    """A number with its 95% interval over resampled seeds and rows; nan where it is not defined."""

    value: float
    low: float
    high: float


def frontier(points: np.ndarray) -> np.ndarray:
    """The points that no other one equals or beats on both axes, by what they learned."""
    ordered = points[np.lexsort((points[:, 1], points[:, 0]))]
    best_after = np.maximum.accumulate(ordered[::-1, 1])[::-1]
    return ordered[ordered[:, 1] > np.append(best_after[1:], -np.inf)]


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The area that points dominate above a reference point (learned, kept)."""
    line = frontier(np.maximum(points - reference, 0))
    return float(np.diff(line[:, 0], prepend=0) @ line[:, 1])


def shared_range(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The least and the most that both have learned, up to the rate at which each learns the most."""
    learned = [points[: points[:, 0].argmax() + 1, 0] for points in (before, after)]
    return max(its.min() for its in learned), min(its.max() for its in learned)


def equal_learning(before: np.ndarray, after: np.ndarray, steps: int = 101) -> float:
    """How much more `after` keeps than `before`, averaged over the amounts that both have learned; nan without any.

    Between the points of its frontier a method keeps what a straight line says, before the first one what that keeps.
    """
    low, high = shared_range(before, after)
    if low > high:
        return float("nan")
    kept = [np.interp(np.linspace(low, high, steps), *frontier(points).T) for points in (before, after)]
    return float((kept[1] - kept[0]).mean())


def estimate(statistic: Callable[..., float], *curves: Curve, seed: int = 0) -> Estimate:
    """A statistic of the points of some curves, with its interval over seeds and rows, resampled alike for all curves.

    For few seeds a bootstrap's interval is too narrow: it is widened by the ratio of the quantiles of the t and the
    normal distribution, with Satterthwaite's degrees of freedom for the variances that seeds and rows cause. Draws do
    not count in which the statistic is not defined; from one in twenty on there is no interval.
    """
    generator, (_, seeds, rows) = np.random.default_rng(seed), curves[0].learned.shape
    drawn = [_weights(generator, size) for size in (seeds, rows, curves[0].kept.shape[2])]
    drawn[2] = drawn[1] if curves[0].same_rows else drawn[2]
    found, by_seed = (
        np.array([statistic(*points) for points in zip(*(curve.points(*weights) for curve in curves), strict=True)])
        for weights in (drawn, [drawn[0], *(np.full_like(its, 1 / its.shape[1]) for its in drawn[1:])])
    )
    value = statistic(*(curve.mean_points for curve in curves))
    if np.isnan(found).mean() >= 1 - CONFIDENCE:
        return Estimate(value, np.nan, np.nan)
    of_seeds, total = np.nanvar(by_seed), np.nanvar(found)
    of_rows = max(total - of_seeds, 0)
    df = (of_seeds + of_rows) ** 2 / (of_seeds**2 / max(seeds - 1, 1) + of_rows**2 / (rows - 1)) if total else np.inf
    wider = stats.t.ppf((1 + CONFIDENCE) / 2, df) / stats.norm.ppf((1 + CONFIDENCE) / 2)
    ends = np.nanquantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, *(float(value + wider * (end - value)) for end in ends))


def _weights(generator: np.random.Generator, size: int) -> np.ndarray:
    """How often each of some seeds or rows is drawn, spread so that the variance of a mean is unbiased for few."""
    drawn = generator.multinomial(size, [1 / size] * size, size=DRAWS)
    return (1 + (drawn - 1) * (size / max(size - 1, 1)) ** 0.5) / size
