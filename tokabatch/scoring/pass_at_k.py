"""pass@k: the probability that at least one of k samples of a problem is right (Chen et al., 2021, equation 1).

The estimator is unbiased: for n samples, c of them right, 1 - C(n - c, k) / C(n, k), averaged over the problems. Samples that
ended in an error count as wrong, so that failures do not flatter a run.
"""

from __future__ import annotations

import numpy as np

from tokabatch.arrays import Float64, Int64


def estimate(num_samples: Int64, num_correct: Int64, k: int) -> Float64:
    """Return pass@k of each problem, shape [R], from its samples (errors included) and the number of right ones. Every problem
    needs at least k samples. The ratio of binomials is computed as a difference of logarithms, so no n is too large; the result
    is exact to about 1e-12."""
    assert k >= 1 and bool((num_samples >= k).all()), "pass@k needs k samples of every problem"
    num_wrong = num_samples - num_correct
    log_all_wrong = log_binomials(np.maximum(num_wrong, k), k) - log_binomials(num_samples, k)
    return np.where(num_wrong < k, 1.0, -np.expm1(log_all_wrong))


def log_binomials(n: Int64, k: int) -> Float64:
    """Return log C(n, k) for each n >= k: minus the sum of logarithms of factors below 1."""
    largest = int(n.max(initial=k))
    # minus_log_C[m] is -log C(m, k): the sum of log(1 - k / i) for i from k + 1 to m.
    minus_log_C = np.zeros(largest + 1)
    minus_log_C[k + 1 :] = np.cumsum(np.log1p(-k / np.arange(k + 1, largest + 1)))
    return -minus_log_C[n]


def ks_of(num_samples: Int64) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and n, the smallest number of samples of a problem. Empty if there is no problem, or one without
    samples."""
    n = int(num_samples.min()) if len(num_samples) else 0
    return tuple(sorted({1 << exponent for exponent in range(n.bit_length())} | {n})) if n else ()
