"""How many samples are admitted, and which wait when pages run short: the default policy, based on a forecast of page use.

Samples are admitted in plan order, as many as the forecast has pages for at every future step. If pages run short all the
same, samples are held: a held sample keeps its pages and computes nothing for a while, so no work is lost, while others end
and free their pages. Samples are ranked by tokens still to come over tokens held, so that those that free the most pages for
the fewest further tokens run first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.kv.manager import KVCacheManager
from tokabatch.scheduling.kv.prefix_tree import PromptPages
from tokabatch.scheduling.lengths.length_estimates import LengthEstimates
from tokabatch.scheduling.lengths.page_forecast import Claims, Forecast
from tokabatch.scheduling.policy.policy import Candidates
from tokabatch.scheduling.work import Work

FORECAST_STEPS = 8
"""Steps for which a forecast is reused, as long as it has pages to spare for the peak use of every new candidate."""
NEARLY_FULL = 1 / 8
"""Share of the pages: with fewer free, the samples that can finish in the pages left are computed."""
FEW = 1 / 4
"""Share of the running samples: if fewer than this can finish, the others are held."""
_RESOLUTION = 64


class ForecastPolicy:
    """See `Policy`."""

    def __init__(self, work: Work, kv: KVCacheManager, lengths: LengthEstimates) -> None:
        self.work = work
        self.kv = kv
        self.lengths = lengths
        self._surely_free = self._steps_good_for = 0
        """Pages free at every future step by the last forecast, less the peaks of all samples admitted since; and the number of
        steps for which that forecast is still used."""
        self._held_epoch = np.full(kv.slots.num_slots, -1, np.int32)
        """The epoch in which each slot was held, -1 if it is not, shape [slots]."""
        self._holding = False
        self._steps_to_look = 0

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        """Return the prompts as given: in plan order, those without pages first."""
        return waiting

    def admit(self, candidates: Candidates) -> Int32:
        """Return how many samples of each candidate fit the pool at every future step; zero while running samples are held."""
        if self._holding:
            return np.zeros_like(candidates.counts)
        size, tree, num_pages = self.kv.page_size, self.kv.tree, self.kv.pool.num_pages
        request = np.repeat(candidates.request, candidates.counts)
        produced = np.repeat(candidates.produced, candidates.counts)
        length = self.work.length[request]
        full, total = (length - 1) // size, -(-length // size)
        closed = np.ones(len(candidates.request), np.bool_)
        known = candidates.request[: candidates.num_known].tolist()
        closed[: candidates.num_known] = [entry not in tree for entry in known]
        opens = np.repeat(closed, candidates.counts)
        claims = Claims(
            computed=length - 1 + produced,
            shared=np.where(opens, total, full),
            remaining=candidates.lengths - produced,
            prompt_pages=np.where(opens, total - np.minimum(self.work.lcp[request] // size, full), 0),
        )
        peak = claims.peak(size)
        self._steps_good_for -= 1
        if self._steps_good_for > 0 and peak <= self._surely_free:
            self._surely_free -= peak
            return candidates.counts
        deviations, forecast = self.lengths.deviations, self._forecast(claims.remaining)
        fitting = forecast.admit(num_pages, claims, deviations)
        self._surely_free = forecast.spare(num_pages, deviations) - peak
        self._steps_good_for = FORECAST_STEPS
        before = np.cumsum(candidates.counts) - candidates.counts
        return np.clip(fitting - before, 0, candidates.counts).astype(np.int32)

    def hold(self, decoding: Int64) -> Int64:
        """Return all slots while enough pages are free, otherwise those of samples that can finish, chosen anew every
        `page_size` steps."""
        slots, pool = self.kv.slots, self.kv.pool
        if pool.num_free > NEARLY_FULL * pool.num_pages or len(slots.order) < 2:
            self._holding = False
            return decoding
        self._steps_to_look -= 1
        if self._steps_to_look <= 0:
            self._steps_to_look = self.kv.page_size
            self._choose_held()
        going = self._not_held(decoding)
        if len(decoding) and not len(going):
            # Every sample that was not held has ended.
            self._choose_held()
            going = self._not_held(decoding)
        return going

    def rank(self, slots: Int64) -> Int64:
        """Order slots by typical remaining tokens over tokens held, ascending."""
        return slots[self._by_yield(slots)]

    def invalidate(self) -> None:
        """Discard the last forecast; the next call of `admit` makes a new one."""
        self._steps_good_for = 0

    def _forecast(self, also: Int32) -> Forecast:
        """Forecast the page use of running samples and open prompts; `also` holds the steps after which candidates end."""
        slots, tree, order = self.kv.slots, self.kv.tree, self.kv.slots.order
        remaining = self.lengths.remaining(order)
        running = Claims(
            # A prompt in prefill counts as computed: the pages for its whole length are claimed from the start.
            computed=np.maximum(slots.length[order] - 1, 0),
            shared=slots.shared_pages[order],
            remaining=remaining,
            prompt_pages=np.zeros(len(order), np.int32),
        )
        held_steps = tree.last_steps(slots.request[order], remaining)
        return Forecast(self.kv.page_size, running, tree.sharing.attributed(), held_steps, also)

    def _not_held(self, decoding: Int64) -> Int64:
        if not self._holding:
            return decoding
        return decoding[self._held_epoch[decoding] != self.kv.slots.epoch[decoding]]

    def _by_yield(self, slots: Int64) -> npt.NDArray[np.intp]:
        """Return indices into `slots`, in the order of `rank`."""
        return np.argsort(self.lengths.typical_remaining(slots) / self.kv.slots.length[slots], kind="stable")

    def _choose_held(self) -> None:
        """Choose the samples to hold from now on: none if all can finish, or as long as enough can."""
        slots, tree, order = self.kv.slots, self.kv.tree, self.kv.slots.order
        by_yield, remaining = self._by_yield(order), self.lengths.remaining(order)
        rank = np.empty(len(order), np.int32)
        rank[by_yield] = np.arange(len(order), dtype=np.int32)
        # A prompt's pages are freed when the last of its samples ends, not before.
        held_rank = tree.last_steps(slots.request[order], rank + 1) - 1
        held_until = tree.last_steps(slots.request[order], remaining)
        number = finishing(
            free=self.kv.pool.num_free,
            page_size=self.kv.page_size,
            rank=np.concatenate((rank, held_rank)),
            end=np.concatenate((remaining, held_until)).astype(np.int64),
            pages=np.concatenate((slots.num_pages[order] - slots.shared_pages[order], tree.sharing.attributed())),
            grows=np.arange(len(order) + len(held_rank)) < len(order),
        )
        self._holding = number < len(order) and (self._holding or number < FEW * len(order)) and number > 0
        self._held_epoch.fill(-1)
        if self._holding:
            held = order[by_yield[number:]]
            self._held_epoch[held] = slots.epoch[held]


def finishing(free: int, page_size: int, rank: Int32, end: Int64, pages: Int32, grows: Bool) -> int:
    """Return the largest number of samples that can run to their ends if only those of a rank below that number continue.

    Entry i holds `pages[i]` pages, which are freed at step `end[i]` from now if its rank is below that number. Entries with
    `grows` are samples, which take one more page every `page_size` steps until then. The number is found by bisection to
    1/64 of the samples, rounded down, so that the samples always fit."""
    by_end = np.argsort(end, kind="stable")
    rank, end, pages, grows = rank[by_end], end[by_end], pages[by_end], grows[by_end]

    def fits(number: int) -> bool:
        inside = rank < number
        freed, alive = np.cumsum(pages[inside]) - pages[inside], np.cumsum(grows[inside][::-1])[::-1]
        return bool(((free + freed) * page_size >= alive * end[inside]).all())

    count = int(grows.sum())
    if fits(count):
        return count
    low, high = 0, count
    while high - low > max(1, count // _RESOLUTION):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
