"""The hazard of a sample, its probability to stop at the next token given its length, and lengths drawn from it.

The hazard is piecewise constant: in each bin of lengths, the number of stops divided by the tokens at risk. Samples that are
still running or were cut off at max_tokens are censored: they are at risk up to their length and do not stop. This is the
estimator of Kaplan and Meier (1958) with bins. With few observations the hazard is close to a prior, which before the first
stop is one stop in half of max_tokens. Lengths are in output tokens.

Shape legend: B bins, G groups (prompts with several samples), N samples.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Float64, Int32

Indices = npt.NDArray[np.integer[Any]]

PRIOR_SAMPLES = 4.0
"""The weight of the prior in each bin of the run, as the tokens at risk of this many samples."""
ENDLESS, MOST_ENDLESS = 0.35, 0.75
"""The assumed share of samples that never stop, while no sample has become long enough to show it; and its bound among the
samples that have not stopped."""
_LEAST_LEFT = 1e-300
"""A lower bound of the share that has not stopped, which is a divisor."""
LEVEL_STOPS = 4.0
"""The number of stops at the preceding lengths from which they outweigh the run's mean in the prior of a bin."""
_FADING, _FALL = 0.8, 0.75
"""The factor by which the weight of a stop decreases from bin to bin in the prior of later bins, and the power of the length
with which the prior decreases."""
_FINE, _RATIO = 16, 1.1
"""The number of bins of one token, and the ratio of the ends of consecutive later bins."""
_MOST_CUMULATED = 60.0
"""An upper bound of cumulative hazards: a share of e^-60 of the samples is none."""


class Bins:
    """Bins of lengths: first single tokens, then increasingly wide bins, each at most a tenth of its length wide."""

    def __init__(self, longest: int) -> None:
        edges = list(range(min(_FINE, longest) + 1))
        while edges[-1] < longest:
            edges.append(min(longest, max(edges[-1] + 1, int(edges[-1] * _RATIO))))
        self.edge = np.array(edges, np.int64)
        self.width = np.diff(self.edge).astype(np.float64)
        self.count = len(self.width)
        self.of = np.repeat(np.arange(self.count), np.diff(self.edge)).astype(np.int32)
        """The bin of the token that follows `i` tokens, for `i` from 0 to longest - 1."""

    def at_risk(self, length: Int32) -> Float64:
        """Return the total number of tokens that samples of these lengths drew in each bin, shape [B]."""
        last = self.of[np.maximum(length - 1, 0)]
        ending = np.bincount(last, minlength=self.count)
        within = np.bincount(last, weights=length - self.edge[last], minlength=self.count)
        later = np.cumsum(ending[::-1])[::-1] - ending
        return within + later * self.width

    def stops(self, length: Int32) -> Float64:
        """Return the number of samples in each bin, given the lengths at which they stopped, shape [B]."""
        return np.bincount(self.of[np.maximum(length - 1, 0)], minlength=self.count).astype(np.float64)


def run_hazard(bins: Bins, stops: Float64, at_risk: Float64) -> Float64:
    """Return the stops per token in each bin over the whole run, shape [B].

    The prior of bins with few observations is a hazard that decreases with a power of the length, at the level of the stops at
    the preceding lengths, for all samples but a share that never stops.
    """
    middle = (bins.edge[1:] + bins.edge[:-1] + 1) / 2
    falling = middle**-_FALL
    # Before the first stop this makes the mean length about half of max_tokens.
    longest = float(bins.edge[-1])
    overall = (1.0 + stops.sum()) / (longest ** (1 - _FALL) / (1 - _FALL) + (at_risk * falling).sum())
    place = np.arange(bins.count)
    before = np.tril(_FADING ** np.maximum(place[:, None] - place[None, :], 0), -1)
    stops_before = before @ stops
    level = (LEVEL_STOPS + stops_before) / (LEVEL_STOPS / overall + before @ (at_risk * falling))
    stopping = np.minimum(level * falling, 1.0)
    weight = PRIOR_SAMPLES * bins.width
    seen = (stops + stopping * weight) / (at_risk + weight)
    frontier = int(np.max(np.flatnonzero(at_risk > weight), initial=-1)) + 1
    left = max(float(np.exp(-(seen * bins.width)[:frontier].sum())), _LEAST_LEFT)
    # The more samples have stopped, the fewer of the rest are assumed never to stop.
    endless = min(ENDLESS / left, left, MOST_ENDLESS)
    reached = np.exp(-np.cumsum(np.where(place < frontier, 0.0, stopping * bins.width)))
    prior = stopping * (1 - endless) * reached / (endless + (1 - endless) * reached)
    return (stops + prior * weight) / (at_risk + weight)


class HazardTable:
    """Rows of hazards, prepared for finding lengths by their survival probability."""

    def __init__(self, bins: Bins, hazards: Float64) -> None:
        """`hazards` has shape [rows, B]."""
        self._bins = bins
        self._rate = -np.log1p(-np.minimum(hazards, 1.0 - 1e-9))
        total = np.concatenate((np.zeros((len(hazards), 1)), np.cumsum(self._rate * bins.width, axis=1)), axis=1)
        self._total = np.minimum(total, _MOST_CUMULATED)
        # All rows in one ascending array, so that one search serves them all.
        self._flat = (self._total + 2 * _MOST_CUMULATED * np.arange(len(hazards))[:, None]).ravel()

    def length(self, row: Int32, generated: Int32, exponential: Float64) -> Int32:
        """Return the drawn length of each sample with `generated` tokens: the length up to which the cumulative hazard grows by
        `exponential`, a standard exponential variate. It is at least generated + 1 and at most the longest; shape [N]."""
        bins = self._bins
        longest = int(bins.edge[-1])
        generated = np.minimum(generated, longest - 1)
        now = bins.of[generated]
        passed = self._total[row, now] + (generated - bins.edge[now]) * self._rate[row, now]
        target = np.minimum(passed + exponential, 1.5 * _MOST_CUMULATED)
        columns = bins.count + 1
        place = np.searchsorted(self._flat, target + 2 * _MOST_CUMULATED * row, side="right") - 1 - row * columns
        beyond = place >= bins.count
        place = np.minimum(place, bins.count - 1)
        into = (target - self._total[row, place]) / np.maximum(self._rate[row, place], 1e-12)
        length = np.ceil(bins.edge[place] + np.minimum(into, bins.width[place]))
        return np.clip(np.where(beyond, longest, length), generated + 1, longest).astype(np.int32)

    def expected(self, generated: Int32, most: Int32) -> Float64:
        """Return how many of the next `most` tokens are expected, by the first row, of samples with `generated` tokens; both
        together are at most the longest. Shape [N]."""
        reaching, longer = self._survival
        return (longer[generated] - longer[generated + most]) / reaching[generated]

    @cached_property
    def _survival(self) -> tuple[Float64, Float64]:
        """The share of samples that reach a token, by the first row, and the sum of the shares from each token on. Shape
        [longest + 1] each."""
        bins = self._bins
        token = np.arange(bins.edge[-1] + 1)
        place = bins.of[np.minimum(token, bins.edge[-1] - 1)]
        reached = self._total[0, place] + (token - bins.edge[place]) * self._rate[0, place]
        reaching = np.exp(-np.minimum(reached, _MOST_CUMULATED))
        # From the end, so that small shares are not lost beside large sums.
        return reaching, np.append(np.cumsum(reaching[-2::-1])[::-1], 0.0)


def strata(ticket: npt.NDArray[np.int64], generated: Int32) -> Float64:
    """Return a standard exponential variate for each sample, determined by its ticket and its number of tokens. The variates
    follow an additive recurrence in two dimensions (Roberts 2018), so that any consecutive tickets cover the distribution
    evenly and sums over many samples are close to their expectation. A sample that has become longer than its last draw gets an
    independent one."""
    uniform = np.mod((ticket + 1) * 0.7548776662466927 + generated * 0.5698402909980532, 1.0)
    return -np.log1p(-np.minimum(uniform, 1.0 - 1e-6))
