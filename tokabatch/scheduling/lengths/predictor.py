"""Predicted lengths of samples, learned during the run; `hazard` and `prompt_scale` have the estimators.

Each sample gets a length of its own, drawn from the distribution of its remaining length. The draws are spread evenly over all
samples, so that a forecast over thousands of them is close to its expectation. `Caution` determines how far above the
expectation page use is planned, from the work that preemptions cost.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.lengths.hazard import Bins, Float64, HazardTable, run_hazard, strata
from tokabatch.scheduling.lengths.prompt_scale import ScaleModel

REFRESH_STEPS = 64
"""The estimate is updated after at most this many steps in which a sample finished."""
TARGET_WASTE = 0.003
"""The share of all computed tokens that may be recomputed after preemptions."""
FIRST_DEVIATIONS, LEAST_DEVIATIONS, MOST_DEVIATIONS = 2.0, 1.0, 10.0
_WINDOW_TOKENS, _GAIN, _MOST_SURPLUS = 50_000, 0.05, 20.0


class LengthPredictor(Protocol):
    """Predicts the lengths of samples in output tokens. Arguments are arrays of N samples: their `request`, `sample` number,
    output tokens `generated` so far, `limit` (max_tokens) and `ticket` (a running number of admissions)."""

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        """Return the total lengths, from `generated` + 1 to `limit`."""
        ...

    def observe(self, request: Int32, length: Int32, stopped: Bool) -> None:
        """Record samples that ended; `stopped` is False if the limit ended them, not the model."""
        ...

    def refresh(self, request: Int32, generated: Int32) -> bool:
        """Update the estimate if that is due, and return whether earlier predictions are outdated. Called once a step with the
        running samples, their requests ascending."""
        ...


class LengthModel:
    """A `LengthPredictor` that learns from finished samples. `grouped` is whether each request has enough samples for hazards
    of its own."""

    def __init__(self, max_tokens: int, grouped: Bool) -> None:
        self.bins = Bins(max_tokens)
        self._grouped = grouped
        self._scales = ScaleModel(max_tokens)
        self._stops, self._at_risk = np.zeros(self.bins.count), np.zeros(self.bins.count)
        self._ended = EndedSamples(self._scales.count)
        self._finished: list[int] = []
        self._fresh: list[tuple[Int32, Int32, Bool]] = []
        self._num_fresh = self._num_seen = self._age = 0
        self._table_request = np.zeros(0, np.int32)
        self._table = HazardTable(self.bins, run_hazard(self.bins, self._stops, self._at_risk)[None])

    def extend(self, grouped: Bool) -> None:
        """Replace `grouped` after requests have been added."""
        self._grouped = grouped

    def observe(self, request: Int32, length: Int32, stopped: Bool) -> None:
        """See `LengthPredictor`."""
        self._fresh.append((request, length, stopped))
        self._num_fresh += len(length)

    def learn(self, length: Int32, stopped: Bool) -> None:
        """Record samples that ended of prompts that are not among the requests."""
        self._at_risk += self.bins.at_risk(length)
        self._stops += self.bins.stops(length[stopped])

    def refresh(self, request: Int32, generated: Int32) -> bool:
        """See `LengthPredictor`. The estimate is updated when the number of samples that ended has grown by an eighth, or after
        `REFRESH_STEPS`."""
        self._age += 1
        due = self._num_fresh > max(8, self._num_seen // 8) or (self._num_fresh and self._age >= REFRESH_STEPS)
        if due:
            self._age = 0
            self._take_in()
            self._estimate(request, generated)
        return bool(due)

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        """See `LengthPredictor`."""
        return self._draw(request, generated, limit, strata(ticket, generated))

    def typical(self, request: Int32, generated: Int32, limit: Int32) -> Int32:
        """Return lengths that are equal for samples of the same prompt and age: those at which the cumulative hazard has grown
        by 1, its mean."""
        return self._draw(request, generated, limit, np.ones(len(request)))

    def expected(self, generated: Int32, most: Int32) -> Float64:
        """Return how many of the next `most` tokens are expected, whatever the prompt, of samples with `generated` tokens;
        shape [N]."""
        return self._table.expected(generated, most)

    def forget(self, requests: list[int]) -> None:
        """Mark prompts as finished: their counts are merged into the run's once their last samples have been counted."""
        self._finished += requests

    def settle(self) -> None:
        """Count all samples that have ended."""
        if self._fresh:
            self._take_in()

    def forget_first(self, count: int) -> None:
        """Reduce the numbers of all requests by `count`. The requests with lower numbers have ended and been counted."""
        self._ended.forget_first(count)
        self._table_request = self._table_request - np.int32(count)

    def _draw(self, request: Int32, generated: Int32, limit: Int32, exponential: Float64) -> Int32:
        row = np.zeros(len(request), np.int32)
        if len(self._table_request):
            place = np.minimum(np.searchsorted(self._table_request, request), len(self._table_request) - 1)
            row = np.where(self._table_request[place] == request, place + 1, 0).astype(np.int32)
        length = self._table.length(row, generated, exponential)
        return np.maximum(np.minimum(length, limit), generated + 1)

    def _take_in(self) -> None:
        """Count the samples that ended, and merge the counts of finished prompts into the run's."""
        request, length, stopped = (np.concatenate(part) for part in zip(*self._fresh, strict=True))
        self._fresh, self._num_seen, self._num_fresh = [], self._num_seen + self._num_fresh, 0
        self._at_risk += self.bins.at_risk(length)
        self._stops += self.bins.stops(length[stopped])
        grouped = self._grouped[request]
        request, length, stopped = request[grouped], length[grouped], stopped[grouped]
        distinct, group = np.unique(request, return_inverse=True)
        stops = self._scales.stops(group[stopped], length[stopped], len(distinct))
        time = self._scales.time_at_risk(group, length, len(distinct))
        self._ended.add(distinct.tolist(), stops, time)
        known = self._ended.take(self._finished)
        self._finished = []
        if len(known[0]):
            self._scales.absorb(*known)

    def _estimate(self, request: Int32, generated: Int32) -> None:
        """Update the table from the samples that ended and those that run: the hazards of the whole run, and those of each
        grouped prompt with running samples."""
        bins = self.bins
        run = run_hazard(bins, self._stops, self._at_risk + bins.at_risk(generated))
        grouped = self._grouped[request]
        request, generated = request[grouped], generated[grouped]
        first = np.flatnonzero(np.diff(request, prepend=-1))
        self._table_request = request[first]
        if not len(first):
            self._table = HazardTable(bins, run[None])
            return
        scales = self._scales
        group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(generated))))
        time = scales.time_at_risk(group, generated, len(first))
        stops, ended_time = self._ended.of(self._table_request.tolist())
        time += ended_time
        weight = scales.fit(scales.per_log(run, bins.of), stops, time)
        rates = scales.rates(weight, np.maximum.reduceat(generated, first))
        own = scales.per_token(rates, (bins.edge[1:] + bins.edge[:-1] + 1) / 2)
        self._table = HazardTable(bins, np.concatenate((run[None], own)))


class EndedSamples:
    """Counts of the samples that ended for each prompt: stops and time at risk in B bins."""

    def __init__(self, num_bins: int) -> None:
        self._row: dict[int, int] = {}
        """The row of each prompt's counts; row 0 belongs to no prompt and is zero."""
        self._free: list[int] = []
        self._counts = np.zeros((2, 1, num_bins))

    def __len__(self) -> int:
        """Return the number of prompts with counts."""
        return len(self._row)

    def add(self, requests: list[int], stops: Float64, time: Float64) -> None:
        """Add counts of G different prompts, shape [G, B] each."""
        fresh = [request for request in requests if request not in self._row]
        if len(fresh) > len(self._free):
            size = self._counts.shape[1]
            self._counts = np.concatenate((self._counts, np.zeros((2, size + len(fresh), self._counts.shape[2]))), axis=1)
            self._free += range(size, self._counts.shape[1])
        for request in fresh:
            self._row[request] = self._free.pop()
        rows = [self._row[request] for request in requests]
        self._counts[0, rows] += stops
        self._counts[1, rows] += time

    def of(self, requests: list[int]) -> tuple[Float64, Float64]:
        """Return stops and time of these prompts, shape [G, B] each; zero if no sample of a prompt has ended."""
        stops, time = self._counts[:, [self._row.get(request, 0) for request in requests]]
        return stops, time

    def take(self, requests: list[int]) -> tuple[Float64, Float64]:
        """Remove the counts of these prompts and return those that there were."""
        rows = [self._row.pop(request) for request in requests if request in self._row]
        stops, time = self._counts[:, rows]
        self._counts[:, rows] = 0.0
        self._free += rows
        return stops, time

    def forget_first(self, count: int) -> None:
        """Reduce the numbers of all prompts by `count`, and remove the prompts with lower numbers."""
        self.take([request for request in self._row if request < count])
        self._row = {request - count: row for request, row in self._row.items()}


class Caution:
    """The quantile of page use that admission plans for, in standard deviations above the expectation. It is raised and lowered
    so that the tokens recomputed after preemptions stay near `TARGET_WASTE` of all computed tokens."""

    def __init__(self) -> None:
        self.deviations = FIRST_DEVIATIONS
        self._computed = self._recomputed = 0

    def update(self, computed: int, recomputed: int) -> None:
        """Adjust the quantile. Called once a step with the running totals of all computed tokens and of recomputed ones."""
        window, wasted = computed - self._computed, recomputed - self._recomputed
        if window < _WINDOW_TOKENS:
            return
        surplus = float(np.clip(wasted / window / TARGET_WASTE, 0.0, _MOST_SURPLUS)) - 1.0
        self.deviations = float(np.clip(self.deviations + _GAIN * surplus, LEAST_DEVIATIONS, MOST_DEVIATIONS))
        self._computed, self._recomputed = computed, recomputed
