"""Paired differences and frontiers, against scipy, by hand, and by their coverage on rows of known correlation."""

import numpy as np
import pytest
from scipy import stats

from hft.reporting import statistics
from hft.reporting.statistics import Curve, difference, equal_learning, estimate, hypervolume, shared_range


def test_one_seed_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    before = generator.normal(size=(1, 200))
    after = before + generator.normal(0.1, 0.5, size=(1, 200))
    found, test = difference([before], [after]), stats.ttest_rel(after[0], before[0])
    assert found.p == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.se < 0.4 * np.hypot(before.std(), after.std()) / 200**0.5  # unpaired it would be far larger


def test_right_and_wrong_is_mcnemar_with_flips_both_ways():
    before = np.array([[1] * 40 + [0] * 60])
    after = np.array([[1] * 37 + [0] * 3 + [1] * 12 + [0] * 48])
    found = difference([before], [after])
    assert (found.gained, found.lost) == (12, 3)
    assert found.mean == pytest.approx(0.09)
    assert found.p == pytest.approx(stats.binomtest(12, 15).pvalue)
    assert found.interval == pytest.approx([0.15 * (2 * end - 1) for end in stats.binomtest(12, 15).proportion_ci()])


def test_an_interval_of_flips_excludes_0_where_mcnemar_is_significant():
    for gained, significant in ((5, False), (6, True)):  # of 100 rows, none lost: p = 2 / 2**gained
        after = np.array([[100.0] * gained + [0.0] * (100 - gained)])
        found = difference([np.zeros((1, 100))], [after])
        assert found.told_apart == significant == (found.interval[0] > 0)
        assert found.interval[1] == pytest.approx(gained)  # as if every flip were a gain


@pytest.mark.parametrize("value", [0, 1])
def test_models_without_a_difference(value):
    same = np.full((1, 10), float(value))
    found = difference([same], [same])
    assert (found.mean, found.p, found.told_apart, found.detectable) == (0, 1, False, 0)


def test_a_difference_that_is_the_same_in_every_row_is_told_apart():
    assert difference([np.zeros((1, 10))], [np.full((1, 10), 0.5)]).told_apart


def groups(generator, matched, seeds=4, rows=60, effect=0.0, row_sd=0.7, seed_sd=0.15):
    """Rows as hard for one group as for the other, an effect per row, and seeds that move a whole model."""
    hard, by_row = generator.normal(size=rows), row_sd * generator.normal(size=rows)
    shared = generator.normal(size=(seeds, 1)) if matched else 0
    models = [shared + seed_sd * generator.normal(size=(seeds, 1)) for _ in "ab"]
    noise = 0.5 * generator.normal(size=(2, seeds, rows))
    return hard + models[0] + noise[0], hard + by_row + effect + models[1] + noise[1]


@pytest.mark.parametrize("matched", [False, True])
def test_the_interval_covers_the_truth_in_95_of_100_experiments(matched):
    generator = np.random.default_rng(1)
    found = [difference(*([group] for group in groups(generator, matched)), matched=matched) for _ in range(600)]
    covered = np.mean([low <= 0 <= high for low, high in (one.interval for one in found)])
    assert 0.93 < covered < 0.985
    mean_error = np.std([one.mean for one in found])
    assert np.sqrt(np.mean([one.se**2 for one in found])) == pytest.approx(mean_error, rel=0.15)


def test_the_detectable_difference_is_detected_in_80_of_100_experiments():
    generator = np.random.default_rng(2)
    effect = np.median([difference(*([g] for g in groups(generator, False))).detectable for _ in range(200)])
    told = np.mean([difference(*([g] for g in groups(generator, False, effect=effect))).told_apart for _ in range(600)])
    assert 0.7 < told < 0.9


def test_area_and_equal_learning_by_hand():
    corner = np.array([[0.5, 0.8], [1.0, 0.4], [0.6, 0.3]])  # the last is beaten by the second
    assert hypervolume(corner, np.zeros(2)) == pytest.approx(0.5 * 0.8 + 0.5 * 0.4)
    assert hypervolume(corner, np.array([0.5, 0.2])) == pytest.approx(0.5 * 0.2)
    assert hypervolume(corner, np.array([2.0, 2.0])) == 0
    lower = corner - [0, 0.1]
    assert equal_learning(lower, corner) == pytest.approx(0.1)
    assert np.isnan(equal_learning(corner, corner + np.array([1, 0])))
    # A method that acts like the other at another rate lies on the same frontier, and keeps no more.
    line = np.array([[x, 1 - x] for x in (0.2, 0.4, 0.6)])
    assert equal_learning(line, line + np.array([0.1, -0.1])) == pytest.approx(0)
    # One that keeps everything up to 0.4 keeps it below, too.
    flat = np.array([[0.2, 0.6], [0.4, 0.6], [0.6, 0.4]])
    assert equal_learning(np.array([[0.2, 0.5], [0.6, 0.4]]), flat) == pytest.approx(0.1, abs=2e-3)


def test_a_rate_too_high_does_not_count_for_the_least_that_was_learned():
    line = np.array([[0.5, 0.6], [0.9, 0.4]])
    better = line + np.array([0.0, 0.1])
    for learned in (0.0, 0.3):
        assert equal_learning(np.array([*line, [learned, 0.0]]), better) == pytest.approx(0.1)
    assert shared_range(np.array([*line, [0.1, 0]]), np.array([[0.2, 0.9], [0.7, 0.5]])) == (0.5, 0.7)


def test_measures_of_the_same_rows_are_resampled_together():
    learned = np.random.default_rng(5).normal([[[0.3]], [[0.7]]], 0.3, size=(2, 1, 50))
    total = [Curve(learned, 1 - learned, same) for same in (True, False)]
    same, other = (estimate(lambda points: points.sum(), curve) for curve in total)  # always 2 on the same rows
    assert same == pytest.approx((2, 2, 2))
    assert other.high - other.low > 0.1


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_widen_the_interval_until_it_covers(monkeypatch, seeds):
    monkeypatch.setattr(statistics, "DRAWS", 200)
    generator = np.random.default_rng(seeds)

    def curve(row_sd):
        noise = generator.normal(size=(1, seeds, 1)) + row_sd * generator.normal(size=(1, 1, 80))
        return Curve(noise, noise)

    for row_sd, most in ((0.1, 1), (20, 0.99)):  # noise of seeds alone, and of rows alone
        found = [estimate(lambda points: points[0, 1], curve(row_sd)) for _ in range(250)]
        assert 0.9 <= np.mean([one.low <= 0 <= one.high for one in found]) <= most


def test_the_interval_at_equal_learning_covers_the_truth(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 300)
    generator = np.random.default_rng(3)

    def curve(shift):
        learned = np.array([0.2, 0.5, 0.7, 0.9])
        noise = [0.03 * generator.normal(size=(4, 5, 1)) + 0.3 * generator.normal(size=(4, 5, 100)) for _ in "lk"]
        return Curve(learned[:, None, None] + noise[0], (1 - learned**2 + shift)[:, None, None] + noise[1])

    found = [estimate(equal_learning, curve(0), curve(0.1)) for _ in range(40)]
    assert np.mean([one.low <= 0.1 <= one.high for one in found]) >= 0.85
    assert all(one.low < one.value < one.high for one in found)
