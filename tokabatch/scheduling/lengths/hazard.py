"""How likely a sample is to stop at its next token: hazards by length, and lengths drawn from them.

A piecewise-constant hazard: in each bin of lengths, stops divided by tokens at risk. Samples that are still running and those
cut by max_tokens are at risk up to where they are and never stop, as in Kaplan and Meier's estimate (1958), of which this is
the form with bins. Where little was seen the hazard leans on a prior, before the first end on one stop in half of
max_tokens. Lengths are output tokens.

Shape legend: B bins, G groups (prompts with several samples), N samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Float64, Int32

Indices = npt.NDArray[np.integer[Any]]

PRIOR_SAMPLES = 4.0
"""Samples' worth of tokens at risk behind the prior of each of the run's bins."""
ENDLESS, MOST_ENDLESS = 0.35, 0.75
"""Share of samples taken never to stop as long as no sample got far enough to tell; and its bound among those still left."""
_LEAST_LEFT = 1e-300
"""Bound of the share still left, by which is divided."""
LEVEL_STOPS = 4.0
"""Stops at the lengths just before until these outweigh the run's mean in the prior of a bin."""
_FADING, _FALL = 0.8, 0.75
"""How the weight of a stop falls from bin to bin in the level of those behind it; and the prior with the length (a power)."""
_FINE, _RATIO = 16, 1.1
"""Bins of one token each, and how much farther each later one reaches than the one before it."""
_MOST_CUMULATED = 60.0
"""Bound of a cumulative hazard: a share of e^-60 that gets so far is none."""


class Bins:
    """Bins of lengths: single tokens first, then ever wider ones, each at most a tenth of its length wide."""

    def __init__(self, longest: int) -> None:
        edges = list(range(min(_FINE, longest) + 1))
        while edges[-1] < longest:
            edges.append(min(longest, max(edges[-1] + 1, int(edges[-1] * _RATIO))))
        self.edge = np.array(edges, np.int64)
        self.width = np.diff(self.edge).astype(np.float64)
        self.count = len(self.width)
        self.of = np.repeat(np.arange(self.count), np.diff(self.edge)).astype(np.int32)
        """The bin in which the token after so many lies, for 0 .. longest - 1."""

    def at_risk(self, length: Int32) -> Float64:
        """Tokens that samples of these lengths drew in each bin, in sum, shape [B]."""
        last = self.of[np.maximum(length - 1, 0)]
        ending = np.bincount(last, minlength=self.count)
        within = np.bincount(last, weights=length - self.edge[last], minlength=self.count)
        later = np.cumsum(ending[::-1])[::-1] - ending
        return within + later * self.width

    def stops(self, length: Int32) -> Float64:
        """Samples that stopped at these lengths, by bin, shape [B]."""
        return np.bincount(self.of[np.maximum(length - 1, 0)], minlength=self.count).astype(np.float64)


def run_hazard(bins: Bins, stops: Float64, at_risk: Float64) -> Float64:
    """Stops per token in each bin, over the whole run, shape [B].

    The prior where nothing was seen: a hazard that falls with a power of the length, as high as the stops at the lengths just
    before say, for all but some samples that never stop."""
    middle = (bins.edge[1:] + bins.edge[:-1] + 1) / 2
    falling = middle**-_FALL
    # Before the first end this makes the mean length about half of max_tokens.
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
    # The more samples have stopped, the fewer of the rest are taken never to stop.
    endless = min(ENDLESS / left, left, MOST_ENDLESS)
    reached = np.exp(-np.cumsum(np.where(place < frontier, 0.0, stopping * bins.width)))
    prior = stopping * (1 - endless) * reached / (endless + (1 - endless) * reached)
    return (stops + prior * weight) / (at_risk + weight)


class HazardTable:
    """Rows of hazards made ready to look lengths up by the chance that they are reached."""

    def __init__(self, bins: Bins, hazards: Float64) -> None:
        """`hazards` has shape [rows, B]."""
        self._bins = bins
        self._rate = -np.log1p(-np.minimum(hazards, 1.0 - 1e-9))
        total = np.concatenate((np.zeros((len(hazards), 1)), np.cumsum(self._rate * bins.width, axis=1)), axis=1)
        self._total = np.minimum(total, _MOST_CUMULATED)
        # All rows in one ascending array, so that one search serves them all.
        self._flat = (self._total + 2 * _MOST_CUMULATED * np.arange(len(hazards))[:, None]).ravel()

    def length(self, row: Int32, generated: Int32, exponential: Float64) -> Int32:
        """The length that a sample with `generated` tokens reaches by a draw: the cumulative hazard grows by `exponential`
        (a standard exponential variate) until there. At least generated + 1, at most the longest; shape [N]."""
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

    def mean_lengths(self, limit: Int32) -> Float64:
        """Expected lengths of fresh samples of the first row that may have at most `limit` tokens, 1 or more; shape [N]."""
        bins = self._bins
        token = np.arange(int(limit.max(initial=1)))
        place = bins.of[np.minimum(token, bins.edge[-1] - 1)]
        reached = self._total[0, place] + (token - bins.edge[place]) * self._rate[0, place]
        return np.cumsum(np.exp(-reached))[limit - 1]


def strata(ticket: npt.NDArray[np.int64], generated: Int32) -> Float64:
    """A standard exponential variate for each sample, by its ticket and the tokens it has: additive recurrence in two
    dimensions (Roberts 2018), so that any run of tickets covers the distribution evenly and sums over many samples come out
    at their expectation. A sample that outlived its last draw gets another one, independent of it."""
    uniform = np.mod((ticket + 1) * 0.7548776662466927 + generated * 0.5698402909980532, 1.0)
    return -np.log1p(-np.minimum(uniform, 1.0 - 1e-6))
