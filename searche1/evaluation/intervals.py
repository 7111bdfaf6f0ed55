"""How sure a mean is: bootstrap intervals, and paired tests of a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Interval = tuple[float, float]

BOOTSTRAP_RESAMPLES = 2000
SIGN_FLIPS = 100_000


def bootstrap_means(values: Sequence[float], *, seed: int) -> np.ndarray:
    """[BOOTSTRAP_RESAMPLES] means of `values` resampled with replacement.

    Exact-match values repeat, so how often each distinct one is drawn is a multinomial: 50,000
    questions cost no more than 50. The interval of all-equal values has no width.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=BOOTSTRAP_RESAMPLES)
    return draws @ distinct / total


def percentile_interval(resampled: np.ndarray) -> Interval:
    """The middle 95 % of resampled means."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def sign_flip_p_value(differences: Mapping[str, Sequence[float]], *, seed: int = 0) -> float:
    """Two-sided p-value of "the mean difference is zero", the sources weighing the same however large they are.

    Under that hypothesis each question's difference is as likely to be -d as d. [SIGN_FLIPS] random flips; for one
    source whose differences are 0, d or -d alone it is exact: McNemar's test. Differences that are all zero give 1.
    """
    parts = []  # of each source: size of a difference, its weight in the mean, how many have it
    for values in differences.values():
        sizes, counts = np.unique(np.abs(np.asarray(values, dtype=np.float64)), return_counts=True)
        parts += [
            (float(size), size / len(values) / len(differences), int(count))
            for size, count in zip(sizes, counts, strict=True)
            if size > 0
        ]
    if not parts:
        return 1.0
    observed = abs(float(np.mean([np.mean(values) for values in differences.values()])))
    if len(parts) == 1:
        (_, weight, count) = parts[0]
        return _binomial_two_sided(count, round(observed / weight))
    generator = np.random.default_rng(seed)
    total = np.zeros(SIGN_FLIPS)
    for _, weight, count in parts:
        total += weight * (2 * generator.binomial(count, 0.5, size=SIGN_FLIPS) - count)
    as_extreme = int(np.count_nonzero(np.abs(total) >= observed * (1 - 1e-9)))
    return (as_extreme + 1) / (SIGN_FLIPS + 1)  # the observed signs are one of the flips, so it is never 0


def _binomial_two_sided(count: int, surplus: int) -> float:
    """P(|heads - tails| >= surplus) of `count` fair coins."""
    from math import exp, lgamma, log

    def log_share(heads: int) -> float:
        return lgamma(count + 1) - lgamma(heads + 1) - lgamma(count - heads + 1) - count * log(2)

    extreme = [heads for heads in range(count + 1) if abs(2 * heads - count) >= surplus]
    return min(1.0, sum(exp(log_share(heads)) for heads in extreme))
