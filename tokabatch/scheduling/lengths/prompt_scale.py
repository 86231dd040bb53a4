"""Length distributions of single prompts: the run's common shape, stretched by a scale for each prompt.

The hazard of prompt g per unit of log-length is lambda(log x - log s_g), an accelerated failure time model (Wei 1992). The
shape lambda and the distribution of scales are estimated without further assumptions on a grid, by EM over all prompts so far;
samples that are still running are censored. A prompt with few observations has the run's distribution of scales, a prompt of
which many samples have ended has its own scale. Lengths are in output tokens.

Shape legend: G prompts, B log-spaced bins, K scales.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Int32
from tokabatch.scheduling.lengths.hazard import Float64, Indices

_RATIO = 1.15
_SHIFTS = np.arange(-24, 25, 4)
"""The scales, as numbers of bins of ratio `_RATIO`: from 1/29 to 29 times the common shape."""
_PRIOR_TIME = 2.0
"""The weight of the run's hazard as a prior in each bin of the shape, as the time at risk of this many bins."""
_PRIOR_PROMPTS = 1.0
_ROUNDS = 2
_LEAST_LIKELY = 1e-300
"""The least weight of a scale, so that the weights do not all vanish."""


class ScaleModel:
    """The shape and the distribution of scales, updated by `fit`. `absorb` keeps the counts of finished prompts."""

    def __init__(self, longest: int) -> None:
        self.count = int(np.log(max(longest, 2)) / np.log(_RATIO)) + 1
        self._step = float(np.log(_RATIO))
        self._mid = np.exp(self._step * (np.arange(self.count) + 0.5))
        self._source = np.clip(np.arange(self.count)[:, None] - _SHIFTS[None, :], 0, self.count - 1)
        """The bin of the shape onto which scale k maps bin b."""
        self._shape: Float64 | None = None
        self._odds = np.full(len(_SHIFTS), 1.0 / len(_SHIFTS))
        self._kept_stops, self._kept_time = np.zeros(self.count), np.zeros(self.count)
        self._kept_odds = np.zeros(len(_SHIFTS))

    def time_at_risk(self, group: Indices, length: Int32, num_groups: int) -> Float64:
        """Return the time at risk, in log-length, of samples of these lengths in each bin, summed by group, shape [G, B]."""
        log = np.log(np.maximum(length, 1)) / self._step
        last = np.minimum(log.astype(np.int64), self.count - 1)
        cell = group.astype(np.int64) * self.count + last
        size = num_groups * self.count
        ending = np.bincount(cell, minlength=size).reshape(num_groups, self.count)
        within = np.bincount(cell, weights=log - last, minlength=size).reshape(num_groups, self.count)
        later = np.cumsum(ending[:, ::-1], axis=1)[:, ::-1] - ending
        return ((within + later) * self._step).astype(np.float64)

    def stops(self, group: Indices, length: Int32, num_groups: int) -> Float64:
        """Return the number of samples that stopped at these lengths, by group and bin, shape [G, B]."""
        cell = group.astype(np.int64) * self.count + self._bin(length)
        return np.bincount(cell, minlength=num_groups * self.count).reshape(num_groups, self.count).astype(np.float64)

    def fit(self, run_rate: Float64, stops: Float64, time: Float64) -> Float64:
        """Update the shape and the scales from the counts of the current prompts and the absorbed ones. Return the probability
        of each scale for each prompt, shape [G, K]. `run_rate` is the run's stops per unit of log-length, shape [B]."""
        shape = run_rate if self._shape is None else self._shape
        weight, prior = np.zeros((len(stops), len(_SHIFTS))), _PRIOR_TIME * self._step
        for _ in range(_ROUNDS):
            weight = self._weigh(shape, stops, time)
            seen = self._kept_stops + self._gather(weight, stops)
            shape = (seen + prior * run_rate) / (self._kept_time + self._gather(weight, time) + prior)
            total = self._kept_odds + weight.sum(axis=0) + _PRIOR_PROMPTS / len(_SHIFTS)
            self._odds = total / total.sum()
        self._shape = shape
        return weight

    def absorb(self, stops: Float64, time: Float64) -> None:
        """Keep the counts of finished prompts, each at its scales weighted by their probabilities."""
        if self._shape is None:
            return
        weight = self._weigh(self._shape, stops, time)
        self._kept_stops += self._gather(weight, stops)
        self._kept_time += self._gather(weight, time)
        self._kept_odds += weight.sum(axis=0)

    def rates(self, weight: Float64, age: Int32) -> Float64:
        """Return the stops per unit of log-length of each prompt, shape [G, B]. Beyond `age`, the tokens of its oldest running
        sample, each scale is weighted by the probability that a sample becomes that long under it."""
        assert self._shape is not None
        per_scale = self._shape[self._source]
        passed = np.cumsum(per_scale, axis=0) * self._step
        bins, rates = self._bin(age), np.empty((len(weight), self.count))
        # Prompts of the same age have these probabilities in common.
        for now in np.unique(bins).tolist():
            chosen = bins == now
            reached = np.exp(-np.maximum(passed - passed[now], 0.0))
            stopping = weight[chosen] @ (reached * per_scale).T + _LEAST_LIKELY * per_scale.sum(axis=1)
            rates[chosen] = stopping / (weight[chosen] @ reached.T + _LEAST_LIKELY * len(_SHIFTS))
        return rates

    def per_token(self, rate: Float64, middle: Float64) -> Float64:
        """Convert rates per unit of log-length to stops per token at the lengths `middle`, along the last axis."""
        return rate[..., self._bin(middle)] / middle

    def per_log(self, hazard: Float64, bin_of: Int32) -> Float64:
        """Convert stops per token to rates in this model's bins; `bin_of` maps a length to its index in `hazard`."""
        return hazard[bin_of[np.minimum(self._mid.astype(np.int64), len(bin_of) - 1)]] * self._mid

    def _bin(self, length: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
        log = np.log(np.maximum(length.astype(np.float64), 1.0)) / self._step
        return np.minimum(log.astype(np.int64), self.count - 1)

    def _weigh(self, shape: Float64, stops: Float64, time: Float64) -> Float64:
        per_scale = np.maximum(shape[self._source], 1e-9)
        likelihood = stops @ np.log(per_scale) - time @ per_scale + np.log(self._odds)
        weight = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)

    def _gather(self, weight: Float64, counts: Float64) -> Float64:
        """Return counts by bin of the shape, with those of each prompt moved back by its scales."""
        moved = np.bincount(self._source.ravel(), weights=(counts.T @ weight).ravel(), minlength=self.count)
        return moved.astype(np.float64)
