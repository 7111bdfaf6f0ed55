from itertools import product

import numpy as np
import pytest

from searche1.evaluation import intervals
from searche1.evaluation.intervals import bootstrap_means, percentile_interval, sign_flip_p_value


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    """Simulated: 1,000 evaluations of 300 questions, true EM 0.44; coverage has a standard error of 0.7 %."""
    generator = np.random.default_rng(0)
    covered = 0
    for number in range(1000):
        low, high = percentile_interval(bootstrap_means(generator.random(300) < 0.44, seed=number))
        covered += low <= 0.44 <= high
    assert 0.925 <= covered / 1000 <= 0.97


def test_the_interval_of_a_macro_average_covers_it_too():
    """Three sources of unequal size, each with its own EM."""
    generator = np.random.default_rng(1)
    truth = {50: 0.6, 200: 0.2, 400: 0.4}
    covered = 0
    for number in range(600):
        means = [
            bootstrap_means(generator.random(n) < p, seed=3 * number + i) for i, (n, p) in enumerate(truth.items())
        ]
        low, high = percentile_interval(np.mean(means, axis=0))
        covered += low <= np.mean(list(truth.values())) <= high
    assert 0.92 <= covered / 600 <= 0.975


def test_resampling_by_counts_has_the_spread_of_resampling_by_draws():
    values = np.array([0.0] * 30 + [0.5] * 10 + [1.0] * 20)
    generator = np.random.default_rng(2)
    drawn = generator.choice(values, size=(4000, 60)).mean(axis=1)
    assert bootstrap_means(values, seed=0).std() == pytest.approx(drawn.std(), rel=0.05)
    assert bootstrap_means(values, seed=0).mean() == pytest.approx(values.mean(), abs=0.005)


def enumerated_p_value(differences):
    """Every assignment of signs, one by one."""
    values = [value for source in differences.values() for value in source]
    weights = [1 / len(source) / len(differences) for source in differences.values() for _ in source]
    observed = abs(sum(w * v for w, v in zip(weights, values, strict=True)))
    sums = [
        abs(sum(s * w * v for s, w, v in zip(signs, weights, values, strict=True)))
        for signs in product((1, -1), repeat=len(values))
    ]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [
        {"nq": [1, 1, 1, 1, -1, 0, 0, 1]},  # McNemar's test, exactly
        {"nq": [1, 1, 1, 1, 1, 1]},
        {"nq": [0.5, 1, -0.5, 1, 0, 0.25, 0.5]},
        {"nq": [1, -1, 1, 1], "bamboogle": [1, 1, 0, -1, 1, 1, 1]},
    ],
)
def test_the_p_value_is_that_of_all_sign_flips(differences):
    assert sign_flip_p_value(differences) == pytest.approx(enumerated_p_value(differences), abs=0.006)


def test_mcnemar_is_exact_for_one_source_of_single_trajectories(monkeypatch):
    monkeypatch.setattr(intervals, "SIGN_FLIPS", 0)  # nothing is drawn
    assert sign_flip_p_value({"nq": [1] * 9 + [-1] + [0] * 90}) == pytest.approx(22 / 1024)


def test_equal_runs_have_p_value_one():
    assert sign_flip_p_value({"nq": [0.0] * 10}) == 1.0


def test_under_the_null_small_p_values_are_as_rare_as_they_say():
    generator = np.random.default_rng(3)
    p_values = [sign_flip_p_value({"nq": generator.choice([-1, 0, 1], size=80)}) for _ in range(500)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.075
