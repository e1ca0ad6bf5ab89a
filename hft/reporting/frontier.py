"""What methods keep beside what they learn: frontiers over learning rates, and keeping at equal learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hft.reporting.collect import Group
from hft.reporting.compare import values_of
from hft.reporting.measure import Column
from hft.reporting.paired import CONFIDENCE

DRAWS = 1000


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


def curves_of(groups: Sequence[Group], x: Column, y: Column) -> dict[str, Curve] | str:
    """The curve of each arm, in what it has more than the base on the same rows; a sentence if that cannot be said.

    The columns are of one score each. None is drawn unless there are two arms, one of them with two learning rates. Of
    groups with more seeds than others the first are taken.
    """
    placed = [group for group in groups if group.first.learning_rate and group.measure(x) and group.measure(y)]
    arms = [group.arm for group in placed]
    if len(set(arms)) in (0, 1, len(arms)):
        return {}
    base = next((group.first for group in groups if group.first.method == "base" and group.measure(x)), None)
    if base is None:
        return "the base is what frontiers are measured from: score it too, and give it to the report"
    seeds = min(len(group.runs) for group in placed)
    runs = [run for group in placed for run in sorted(group.runs, key=lambda run: str(run.order))[:seeds]]
    cubes = []
    for column in (x, y):
        found = values_of([base, *runs], column.keys[0])
        if found is None or isinstance(found, str):
            return found or {}
        more = (found[0][1:] - found[0][0]) * (1 if column.higher_is_better else -1)
        cubes.append(more.reshape(len(placed), seeds, -1))
    return {arm: Curve(*(cube[[one == arm for one in arms]] for cube in cubes)) for arm in dict.fromkeys(arms)}


def frontier(points: np.ndarray) -> np.ndarray:
    """The points that no other one equals or beats on both axes, by what they learned."""
    ordered = points[np.lexsort((points[:, 1], points[:, 0]))[::-1]]
    best_so_far = np.maximum.accumulate(ordered[:, 1])
    return ordered[np.concatenate([[True], ordered[1:, 1] > best_so_far[:-1]])][::-1]


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The area that points dominate above a reference point (learned, kept)."""
    above = points[(points > reference).all(1)]
    if not len(above):
        return 0.0
    line = frontier(above) - reference
    return float(np.diff(line[:, 0], prepend=0) @ line[:, 1])


def equal_learning(before: np.ndarray, after: np.ndarray, steps: int = 101) -> float:
    """How much more `after` keeps than `before`, averaged over the amounts that both have learned; nan without any.

    Between the points of its frontier a method keeps what a straight line says.
    """
    lines = [frontier(points).T for points in (before, after)]
    low, high = max(learned[0] for learned, _ in lines), min(learned[-1] for learned, _ in lines)
    if low > high:
        return float("nan")
    kept = [np.interp(np.linspace(low, high, steps), *line) for line in lines]
    return float((kept[1] - kept[0]).mean())


def estimate(statistic: Callable[..., float], *curves: Curve, seed: int = 0) -> Estimate:
    """A statistic of the points of some curves, with its interval over seeds and rows, resampled alike for all curves.

    Draws in which it is not defined, such as curves without a common amount learned, do not count; if they are more
    than one in twenty, there is no interval.
    """
    generator = np.random.default_rng(seed)
    weights = [_weights(generator, size) for size in (*curves[0].learned.shape[1:], curves[0].kept.shape[2])]
    drawn = zip(*(curve.points(*weights) for curve in curves), strict=True)
    values = np.array([statistic(*points) for points in drawn])
    few = np.isnan(values).mean() >= 1 - CONFIDENCE
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if not few else [np.nan] * 2
    return Estimate(statistic(*(curve.mean_points for curve in curves)), float(low), float(high))


def _weights(generator: np.random.Generator, size: int) -> np.ndarray:
    """How often each of some seeds or rows is drawn, spread so that the variance of a mean is unbiased for few."""
    drawn = generator.multinomial(size, [1 / size] * size, size=DRAWS)
    return (1 + (drawn - 1) * (size / max(size - 1, 1)) ** 0.5) / size
