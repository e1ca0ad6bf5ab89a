"""What methods keep beside what they learn: frontiers over learning rates, and keeping at equal learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hft.reporting.paired import CONFIDENCE

DRAWS = 2000


@dataclass(frozen=True)
class Curve:
    """One method over its learning rates; more is better on both axes. All curves share their rows and seeds.

    Args:
        learned: of shape (rates, seeds, rows).
        kept: of shape (rates, seeds, rows), on rows of its own.
    """

    learned: np.ndarray
    kept: np.ndarray

    def points(self, seeds: np.ndarray, learned_rows: np.ndarray, kept_rows: np.ndarray) -> np.ndarray:
        """Learned and kept per rate, of shape (rates, 2), as means with the given weights of seeds and rows."""
        learned = np.einsum("asr,s,r->a", self.learned, seeds, learned_rows)
        return np.stack([learned, np.einsum("asr,s,r->a", self.kept, seeds, kept_rows)], axis=1)

    @property
    def mean_points(self) -> np.ndarray:
        return np.stack([self.learned.mean((1, 2)), self.kept.mean((1, 2))], axis=1)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over resampled seeds and rows."""

    value: float
    low: float
    high: float


def frontier(points: np.ndarray) -> np.ndarray:
    """The points that no other one equals or beats on both axes, by what they learned."""
    kept: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))[::-1]]:
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return np.array(kept[::-1])


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The area that points dominate above a reference point (learned, kept)."""
    above = frontier(points[(points > reference).all(1)]) - reference if (points > reference).all(1).any() else None
    if above is None:
        return 0.0
    widths = np.diff(above[:, 0], prepend=0)
    return float(widths @ above[:, 1])


def kept_at(points: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """What a method keeps where it has learned so much: linear between the points of its frontier."""
    line = frontier(points)
    return np.interp(learned, line[:, 0], line[:, 1])


def equal_learning(before: np.ndarray, after: np.ndarray, steps: int = 101) -> float:
    """How much more `after` keeps than `before`, averaged over the amounts that both have learned; nan without any."""
    lines = [frontier(points)[:, 0] for points in (before, after)]
    low, high = max(line[0] for line in lines), min(line[-1] for line in lines)
    if low > high:
        return float("nan")
    learned = np.linspace(low, high, steps)
    return float((kept_at(after, learned) - kept_at(before, learned)).mean())


def estimate(statistic: Callable[..., float], *curves: Curve, seed: int = 0) -> Estimate:
    """A statistic of the points of some curves, with its interval over seeds and rows, resampled alike for all curves.

    Draws in which it is not defined, such as curves without a common amount learned, are left out of the interval; if
    it is undefined in more than one in twenty, so is the interval.
    """
    generator, values = np.random.default_rng(seed), []
    sizes = [*curves[0].learned.shape[1:], curves[0].kept.shape[2]]
    for _ in range(DRAWS):
        weights = [_weights(generator, size) for size in sizes]
        values.append(statistic(*(curve.points(*weights) for curve in curves)))
    defined = np.array(values)[np.isfinite(values)]
    tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    low, high = np.quantile(defined, tails) if len(defined) > CONFIDENCE * DRAWS else (float("nan"),) * 2
    return Estimate(statistic(*(curve.mean_points for curve in curves)), float(low), float(high))


def _weights(generator: np.random.Generator, size: int) -> np.ndarray:
    """How often each of some seeds or rows is drawn, spread so that the variance of a mean is unbiased for few."""
    if size == 1:
        return np.ones(1)
    drawn = generator.multinomial(size, [1 / size] * size)
    return (1 + (drawn - 1) * (size / (size - 1)) ** 0.5) / size
