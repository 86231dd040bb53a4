"""How long samples will be, learned while they run: see `hazard` and `prompt_scale` for the estimates.

Every sample gets a length of its own, drawn from the distribution of what remains for it and spread evenly over all
samples, so that a forecast over thousands of them is at its expectation. `Caution` says how far above its expectation page
use is planned for, by the work that preemptions cost.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.lengths.hazard import Bins, Float64, HazardTable, run_hazard, strata
from tokabatch.scheduling.lengths.prompt_scale import ScaleModel

REFRESH_STEPS = 64
"""The estimate is renewed after at most so many steps in which anything finished."""
TARGET_WASTE = 0.003
"""Share of all computed tokens that may be computed again after preemptions."""
FIRST_DEVIATIONS, LEAST_DEVIATIONS, MOST_DEVIATIONS = 2.0, 1.0, 10.0
_WINDOW_TOKENS, _GAIN, _MOST_SURPLUS = 50_000, 0.05, 20.0


class LengthPredictor(Protocol):
    """Lengths, as far as they can be foreseen. Arrays of N samples: their `request`, `sample` number, output tokens
    `generated` so far, `limit` (max_tokens) and `ticket` (the number of their admission)."""

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        """Total lengths, from generated + 1 to limit."""
        ...

    def observe(self, request: Int32, length: Int32, stopped: Bool) -> None:
        """Samples that ended; `stopped` is False where the limit, not the model, ended them."""
        ...

    def refresh(self, request: Int32, generated: Int32) -> bool:
        """Asked once a step, with what runs (requests ascending); True where earlier predictions are out of date."""
        ...


class LengthModel:
    """The learning `LengthPredictor`. `grouped` says of each request whether it has several samples, of which a prompt's own
    hazards can be learned."""

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
        """Replace what is known of each request, when more have been added."""
        self._grouped = grouped

    def observe(self, request: Int32, length: Int32, stopped: Bool) -> None:
        """See `LengthPredictor`."""
        self._fresh.append((request, length, stopped))
        self._num_fresh += len(length)

    def learn(self, length: Int32, stopped: Bool) -> None:
        """Samples of prompts that are not among these have ended."""
        self._at_risk += self.bins.at_risk(length)
        self._stops += self.bins.stops(length[stopped])

    def refresh(self, request: Int32, generated: Int32) -> bool:
        """See `LengthPredictor`. The estimate is renewed when an eighth more has been seen, or after `REFRESH_STEPS`."""
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
        """Lengths that any two samples of one prompt and age share: where the cumulative hazard has grown by 1, its mean."""
        return self._draw(request, generated, limit, np.ones(len(request)))

    def mean_lengths(self, limit: Int32) -> Float64:
        """Expected output tokens of samples that have not begun and may have at most `limit`, shape [N]."""
        return self._table.mean_lengths(limit)

    def forget(self, requests: list[int]) -> None:
        """These prompts are finished: what is learned of each goes into the run's once their last samples have been counted."""
        self._finished += requests

    def settle(self) -> None:
        """Count all that has ended."""
        if self._fresh:
            self._take_in()

    def forget_first(self, count: int) -> None:
        """The numbers of all requests become less by so many; those that had less have ended, and are counted."""
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
        """Count the samples that ended, and let finished prompts' own counts become the run's."""
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
        """Renew the table from all that ended and from what runs: hazards of the run, and of each prompt whose own lengths are
        learned and that has running samples."""
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
    """Of each prompt the samples that ended: stops, and time at risk, in B bins."""

    def __init__(self, num_bins: int) -> None:
        self._row: dict[int, int] = {}
        """Where each prompt's counts are; those of row 0, of no prompt, are zero."""
        self._free: list[int] = []
        self._counts = np.zeros((2, 1, num_bins))

    def __len__(self) -> int:
        """Prompts of which any are counted."""
        return len(self._row)

    def add(self, requests: list[int], stops: Float64, time: Float64) -> None:
        """Count further ones of G different prompts, shape [G, B] each."""
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
        """Stops and time of these prompts, shape [G, B] each; zero where none has ended."""
        stops, time = self._counts[:, [self._row.get(request, 0) for request in requests]]
        return stops, time

    def take(self, requests: list[int]) -> tuple[Float64, Float64]:
        """Forget those of these prompts that have any, and return what was counted of them."""
        rows = [self._row.pop(request) for request in requests if request in self._row]
        stops, time = self._counts[:, rows]
        self._counts[:, rows] = 0.0
        self._free += rows
        return stops, time

    def forget_first(self, count: int) -> None:
        """The numbers of all prompts become less by so many; those that had less are forgotten."""
        self.take([request for request in self._row if request < count])
        self._row = {request - count: row for request, row in self._row.items()}


class Caution:
    """The quantile of page use that admission plans for, in standard deviations above its expectation. It holds the tokens
    computed again after preemptions near `TARGET_WASTE` of all tokens computed: more of them raise it, fewer lower it."""

    def __init__(self) -> None:
        self.deviations = FIRST_DEVIATIONS
        self._computed = self._recomputed = 0

    def update(self, computed: int, recomputed: int) -> None:
        """Called once a step with the running totals of all tokens and of those to compute again."""
        window, wasted = computed - self._computed, recomputed - self._recomputed
        if window < _WINDOW_TOKENS:
            return
        surplus = float(np.clip(wasted / window / TARGET_WASTE, 0.0, _MOST_SURPLUS)) - 1.0
        self.deviations = float(np.clip(self.deviations + _GAIN * surplus, LEAST_DEVIATIONS, MOST_DEVIATIONS))
        self._computed, self._recomputed = computed, recomputed
