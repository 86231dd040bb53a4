"""Page use at every future step, exact for given remaining lengths, and how many waiting samples fit under it.

Time is counted in decode steps from now. A sequence with `computed` positions occupies ceil((computed + t + 1) / page_size)
pages at step t while t < remaining; pages that it does not own are counted once, with their prompt. Between two ends page use
only grows, so it is computed at the last step of every sequence and nowhere else: the peak is among these, however many
thousand steps ahead they lie. A sequence's pages grow at steps that depend on computed % page_size alone, so sequences are
summed by that class, over ends sorted by time.

Source of the idea: the Tokasaurus scheduler's simulation of the future (Juravsky et al. 2025), there in buckets of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Int32

_BLOCK_CELLS = 1 << 16
"""Candidates times steps that are examined together; bounds the memory, and the work done after the first that does not fit."""
_PAGES_SQUARED = 2.0
"""The mean square of the pages of a sequence over the square of their mean."""
_FORESEEN = 0.1
"""The share of samples that have ended after which the spread of page use no longer grows; see `Forecast.spread`."""

Curve = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Claims:
    """Arrays over sequences: `computed` positions, of whose pages the first `shared` are not their own, and `remaining` steps
    (at least 1). `prompt_pages` are the pages that a sequence adds for its prompt, held as long as its own."""

    computed: Int32
    shared: Int32
    remaining: Int32
    prompt_pages: Int32

    def peak(self, page_size: int) -> int:
        """Return the most pages that all of them together can hold."""
        own = -(-(self.computed + self.remaining) // page_size) - self.shared
        return int((own + self.prompt_pages).sum())


class Forecast:
    """The page-use curve of what runs. Prompts hold `held_pages[i]` further pages for `held_steps[i]` steps."""

    def __init__(self, page_size: int, running: Claims, held_pages: Int32, held_steps: Int32, also: Int32) -> None:
        """`also` holds further numbers of steps after which something may end: those of candidates."""
        self.page_size = page_size
        held_steps = np.maximum(held_steps, 1)
        horizon = max(int(array.max(initial=1)) for array in (running.remaining, also))
        ends = np.zeros(horizon + 1, np.bool_)
        ends[running.remaining] = True
        ends[also] = True
        ends[np.minimum(held_steps, horizon)] = True
        ends[horizon] = True
        self.steps: Int32 = np.flatnonzero(ends).astype(np.int32) - 1
        """The steps at which page use is computed, ascending: the last ones before something ends."""
        self._place = np.cumsum(ends) - 1
        own, num_alive = self._private(running)
        place = self._place[np.minimum(held_steps, horizon)]
        ending = np.bincount(place, weights=held_pages, minlength=len(self.steps)).astype(np.int64)
        self.curve: Curve = own + np.cumsum(ending[::-1])[::-1]
        number = max(len(running.remaining), 1)
        gone = np.minimum(1.0 - num_alive / number, _FORESEEN)
        self.spread = own * np.sqrt(_PAGES_SQUARED * gone / ((1.0 - gone) * number))
        """The standard deviation of page use at each step if samples ended at random, as often as the given lengths say. It
        stops growing once a share of `_FORESEEN` has ended: what comes later can still be met by admitting less."""

    def spare(self, capacity: int, deviations: float) -> int:
        """Return how many of `capacity` pages are free at every step if page use exceeds its expectation by so many standard
        deviations; negative if they do not suffice."""
        return int((capacity - np.ceil(deviations * self.spread) - self.curve).min())

    def admit(self, capacity: int, candidates: Claims, deviations: float = 0.0) -> int:
        """Return how many candidates, taken in their order, fit into `capacity` pages at every step if page use exceeds its
        expectation by so many standard deviations; 0 if what runs does not fit by itself. Their `remaining` was in `also`."""
        capacity_E = capacity - np.ceil(deviations * self.spread).astype(np.int64)
        count = len(candidates.remaining)
        if not count:
            return 0
        # The steps at which all candidates together might not fit, if they ran that long.
        base = int((candidates.computed // self.page_size + 2 - candidates.shared + candidates.prompt_pages).sum())
        bound = self.curve + base + count * (self.steps // self.page_size)
        in_time = (self.steps < int(candidates.remaining.max())) | (self.curve > capacity_E)
        relevant = np.flatnonzero((bound > capacity_E) & in_time)
        if not len(relevant):
            return count
        steps, spare = self.steps[relevant], capacity_E[relevant] - self.curve[relevant]
        if (spare < 0).any():
            return 0
        block = max(1, _BLOCK_CELLS // len(steps))
        for begin in range(0, count, block):
            part = slice(begin, begin + block)
            used = np.cumsum(self._pages(candidates, part, steps), axis=0)
            fits = (used <= spare).all(axis=1)
            if not fits.all():
                return begin + int(np.argmin(fits))
            spare = spare - used[-1]
        return count

    def _pages(self, candidates: Claims, part: slice, steps: Int32) -> Int32:
        """Return the pages of each candidate of `part` at each of the steps, shape [candidates, steps]."""
        size = self.page_size
        computed = candidates.computed[part]
        alive = steps[None, :] < candidates.remaining[part, None]
        pages = (steps // size)[None, :] + ((steps % size)[None, :] >= (size - computed % size)[:, None])
        pages += (computed // size + 1 - candidates.shared[part] + candidates.prompt_pages[part])[:, None]
        return np.where(alive, pages, 0)

    def _private(self, running: Claims) -> tuple[Curve, Curve]:
        """Return for t in `steps` the sum of (computed + t) // page_size + 1 - shared over sequences with t < remaining, and
        the number of these.

        With computed = b * size + o and t = q * size + m the quotient is b + q, and one more where o + m >= size."""
        size, count = self.page_size, len(self.steps)
        place = self._place[running.remaining]
        offset = running.computed % size
        by_class = np.bincount(offset * count + place, minlength=size * count).reshape(size, count)
        # alive[o, e]: sequences of class o or a later one that run at step e.
        alive = np.cumsum(by_class[::-1, ::-1], axis=1)[:, ::-1]
        alive = np.cumsum(alive, axis=0)[::-1]
        base = np.bincount(place, weights=running.computed // size + 1 - running.shared, minlength=count)
        base = np.cumsum(base[::-1])[::-1].astype(np.int64)
        whole, rest = self.steps // size, self.steps % size
        carried = np.where(rest > 0, alive[(size - rest) % size, np.arange(count)], 0)
        return base + alive[0] * whole + carried, alive[0]
