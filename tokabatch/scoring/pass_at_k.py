"""pass@k: the chance that at least one of k samples of a problem is right (Chen et al., 2021, equation 1).

The estimator is unbiased: of n samples, c of them right, 1 - C(n - c, k) / C(n, k), averaged over the problems. Samples
that ended in an error count as wrong, so that a run is not flattered by what it could not do. This module does not know
where the counts come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Float64, Int64


@dataclass(frozen=True, slots=True)
class PassAtK:
    """One point of the curve: the mean of pass@k over the problems."""

    k: int
    value: float


def estimate(num_samples: Int64, num_correct: Int64, k: int) -> Float64:
    """pass@k of each problem, shape [R], from its samples (errors included) and those of them that are right.

    Every problem needs at least k samples. The ratio of binomials is a product of factors below 1 and is summed as
    logarithms, so no n is too large; the result is exact to about 1e-12.
    """
    assert k >= 1 and bool((num_samples >= k).all()), "pass@k needs k samples of every problem"
    largest = int(num_samples.max(initial=k))
    # minus_log_C[m] is -log C(m, k): the sum of log(1 - k / i) for i from k + 1 to m.
    minus_log_C = np.zeros(largest + 1)
    minus_log_C[k + 1 :] = np.cumsum(np.log1p(-k / np.arange(k + 1, largest + 1)))
    num_wrong = num_samples - num_correct
    log_all_wrong = minus_log_C[num_samples] - minus_log_C[num_wrong]
    return np.where(num_wrong < k, 1.0, -np.expm1(log_all_wrong))


def curve(num_samples: Int64, num_correct: Int64) -> tuple[PassAtK, ...]:
    """pass@k for k = 1, 2, 4, ... and n; n is the smallest number of samples that a problem has.

    Empty where there is no problem, or one without samples.
    """
    n = int(num_samples.min()) if len(num_samples) else 0
    ks = sorted({1 << exponent for exponent in range(n.bit_length())} | {n}) if n else []
    return tuple(PassAtK(k, float(estimate(num_samples, num_correct, k).mean())) for k in ks)


@dataclass(frozen=True, slots=True)
class PassBand:
    """One point of the curve with its 95 % confidence band."""

    k: int
    value: float
    low: float
    high: float


def curve_with_band(num_samples: Int64, num_correct: Int64) -> tuple[PassBand, ...]:
    """`curve`, with the band that choosing other problems from where these came from would move in: the mean's normal interval
    over problems, within 0 and 1. One problem alone has the widest band there is."""
    points: list[PassBand] = []
    for point in curve(num_samples, num_correct):
        each = estimate(num_samples, num_correct, point.k)
        spread = 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5 if len(each) > 1 else 1.0
        points.append(PassBand(point.k, point.value, max(0.0, point.value - spread), min(1.0, point.value + spread)))
    return tuple(points)
