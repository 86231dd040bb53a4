"""What the samples of one prompt say about each other: a prompt's lengths are the run's common shape, stretched by a scale.

The hazard per unit of log-length of prompt g is lambda(log x - log s_g): an accelerated-failure-time model (Wei 1992) with the
shape lambda and the distribution of scales both free, on a grid, fitted by EM over all prompts seen so far; samples still
running count as censored. A prompt of which little is known has the run's distribution of scales, one with many samples ended
its own scale. Lengths are output tokens.

Shape legend: G prompts, B log-spaced bins, K scales.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Int32
from tokabatch.scheduling.lengths.hazard import Float64, Indices

_RATIO = 1.15
_SHIFTS = np.arange(-24, 25, 4)
"""Scales as bins of `_RATIO`: from 1/29 to 29 times the common shape."""
_PRIOR_TIME = 2.0
"""Bins' worth of time at risk behind the run's hazard in each bin of the shape."""
_PRIOR_PROMPTS = 1.0
_ROUNDS = 2
_LEAST_LIKELY = 1e-300
"""Weight of a scale that is out of the question, so that one is left where all are."""


class ScaleModel:
    """The shape and the scales, renewed by `fit`. Counts of prompts that are finished stay in it through `absorb`."""

    def __init__(self, longest: int) -> None:
        self.count = int(np.log(max(longest, 2)) / np.log(_RATIO)) + 1
        self._step = float(np.log(_RATIO))
        self._mid = np.exp(self._step * (np.arange(self.count) + 0.5))
        self._source = np.clip(np.arange(self.count)[:, None] - _SHIFTS[None, :], 0, self.count - 1)
        """For bin b and scale k the bin of the shape that b falls on."""
        self._shape: Float64 | None = None
        self._odds = np.full(len(_SHIFTS), 1.0 / len(_SHIFTS))
        self._kept_stops, self._kept_time = np.zeros(self.count), np.zeros(self.count)
        self._kept_odds = np.zeros(len(_SHIFTS))

    def time_at_risk(self, group: Indices, length: Int32, num_groups: int) -> Float64:
        """Log-time that samples of these lengths spent in each bin, summed by group, shape [G, B]."""
        log = np.log(np.maximum(length, 1)) / self._step
        last = np.minimum(log.astype(np.int64), self.count - 1)
        cell = group.astype(np.int64) * self.count + last
        size = num_groups * self.count
        ending = np.bincount(cell, minlength=size).reshape(num_groups, self.count)
        within = np.bincount(cell, weights=log - last, minlength=size).reshape(num_groups, self.count)
        later = np.cumsum(ending[:, ::-1], axis=1)[:, ::-1] - ending
        return ((within + later) * self._step).astype(np.float64)

    def stops(self, group: Indices, length: Int32, num_groups: int) -> Float64:
        """Samples that stopped at these lengths, by group and bin, shape [G, B]."""
        cell = group.astype(np.int64) * self.count + self._bin(length)
        return np.bincount(cell, minlength=num_groups * self.count).reshape(num_groups, self.count).astype(np.float64)

    def fit(self, run_rate: Float64, stops: Float64, time: Float64) -> Float64:
        """Renew shape and scales from the counts of the prompts at hand and those absorbed; returns how likely each scale is
        for each prompt, shape [G, K]. `run_rate` is the run's stops per unit of log-length, shape [B]."""
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
        """Keep the counts of finished prompts, each at its likely scales."""
        if self._shape is None:
            return
        weight = self._weigh(self._shape, stops, time)
        self._kept_stops += self._gather(weight, stops)
        self._kept_time += self._gather(weight, time)
        self._kept_odds += weight.sum(axis=0)

    def rates(self, weight: Float64, age: Int32) -> Float64:
        """Stops per unit of log-length of each prompt whose oldest running sample has `age` tokens, shape [G, B]: beyond that
        age a scale counts by the chance that a sample gets so far under it."""
        assert self._shape is not None
        per_scale = self._shape[self._source]
        passed = np.cumsum(per_scale, axis=0) * self._step
        bins, rates = self._bin(age), np.empty((len(weight), self.count))
        # Prompts of one age have the chances in common.
        for now in np.unique(bins).tolist():
            chosen = bins == now
            reached = np.exp(-np.maximum(passed - passed[now], 0.0))
            stopping = weight[chosen] @ (reached * per_scale).T + _LEAST_LIKELY * per_scale.sum(axis=1)
            rates[chosen] = stopping / (weight[chosen] @ reached.T + _LEAST_LIKELY * len(_SHIFTS))
        return rates

    def per_token(self, rate: Float64, middle: Float64) -> Float64:
        """Rates per unit of log-length as stops per token at the lengths `middle`, along the last axis."""
        return rate[..., self._bin(middle)] / middle

    def per_log(self, hazard: Float64, bin_of: Int32) -> Float64:
        """Stops per token as rates in this model's bins; `bin_of` maps a length to its place in `hazard`."""
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
        """Counts by bin of the shape: those of each prompt moved back by its scales."""
        moved = np.bincount(self._source.ravel(), weights=(counts.T @ weight).ravel(), minlength=self.count)
        return moved.astype(np.float64)
