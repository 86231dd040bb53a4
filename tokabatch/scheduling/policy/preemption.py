"""What is done when pages run short: samples wait, and as the last resort one is preempted.

A sample that waits keeps its pages and computes nothing for a while, which costs no work at all, while others end and free
theirs. Whoever frees most for what it still takes goes first: samples stand in the order of tokens to go over tokens held. From
the other end of that order samples are preempted, where waiting alone would leave too little running.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokabatch.messages import Bool, Int32, Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.page_pool import PagePool
from tokabatch.scheduling.kv.prefix_tree import OpenPrompts
from tokabatch.scheduling.kv.slots import Sequences
from tokabatch.scheduling.lengths.estimates import Expectations
from tokabatch.scheduling.policy.admission import Admission
from tokabatch.scheduling.step_builder import StepDraft

NEARLY_FULL = 1 / 8
"""With a smaller share of the pages free it is looked ahead who can finish in what is left."""
FEW = 1 / 4
"""Once fewer than this share of the running samples can, the others begin to wait."""
MOST_SHORT = 3 / 4
"""A larger share of a step's samples than this is not kept waiting: one is preempted."""
_RESOLUTION = 64


class Shortage:
    """Shares the scheduler's books. `hold` and `grow` are called once a step each."""

    def __init__(
        self,
        page_size: int,
        pool: PagePool,
        prompts: OpenPrompts,
        sequences: Sequences,
        counts: SchedulerCounts,
        expectations: Expectations,
        admission: Admission,
    ) -> None:
        self._page_size = page_size
        self._pool = pool
        self._prompts = prompts
        self._sequences = sequences
        self._counts = counts
        self._expectations = expectations
        self._admission = admission
        self._held_epoch = np.full(sequences.num_slots, -1, np.int32)
        """The epoch of each slot that is held back."""
        self._holding = self._short = False
        self._steps_to_look = 0
        self.num_waiting = 0
        """Samples that the step being decided leaves out for want of pages."""

    @property
    def acute(self) -> bool:
        """Running samples wait for pages: nothing is to be admitted."""
        return self._holding or self._short

    def hold(self, decoding: Int64) -> Int64:
        """Those of a step's `decoding` slots that need not wait for others to finish. Looked at once in as many steps as fill a
        page; in between the same wait."""
        seq = self._sequences
        self.num_waiting = 0
        if self._pool.num_free > NEARLY_FULL * self._pool.num_pages or len(seq.order) < 2:
            self._holding = False
            return decoding
        self._steps_to_look -= 1
        if self._steps_to_look <= 0:
            self._steps_to_look = self._page_size
            self._look()
        going = self._going(decoding)
        if len(decoding) and not len(going):
            # All that might go on have ended since.
            self._look()
            going = self._going(decoding)
        self.num_waiting = len(decoding) - len(going)
        return going

    def _going(self, decoding: Int64) -> Int64:
        if not self._holding:
            return decoding
        return decoding[self._held_epoch[decoding] != self._sequences.epoch[decoding]]

    def grow(self, decoding: Int64, draft: StepDraft) -> Int64:
        """Give each slot the page its next position needs; returns those that have it. Where the pool is short some wait for a
        step, or samples are preempted, these or others."""
        seq = self._sequences
        needs = decoding[(seq.computed >= seq.num_pages * self._page_size)[decoding]]
        self._short = False
        while len(needs) > self._pool.num_free:
            if self._prompts.suspend_idle():
                continue
            short = len(needs) - self._pool.num_free
            if short <= MOST_SHORT * len(decoding):
                wait = needs[self._by_yield(needs)[self._pool.num_free :]]
                needs, decoding = np.setdiff1d(needs, wait), decoding[~np.isin(decoding, wait)]
                self.num_waiting += len(wait)
                self._short = True
                break
            victim = self.preempt()
            needs, decoding = needs[needs != victim], decoding[decoding != victim]
        if len(needs):
            draft.set_pages(seq.add_pages(needs, np.ones(len(needs), np.int32)))
        return decoding

    def preempt(self) -> int:
        """Give up the pages of the sample that has the longest way to go for what it costs to compute again; its slot."""
        seq = self._sequences
        assert len(seq.order) > 1, "a single sample does not fit the pool; the job was sized wrongly"
        unfinished = seq.order[seq.length[seq.order] > seq.computed[seq.order]]
        victim = int(unfinished[self._by_yield(unfinished)[-1]])
        self._counts.given_up_tokens += max(0, int(seq.computed[victim] - seq.cached_tokens[victim]))
        self._admission.take_back(victim)
        self._counts.preemptions += 1
        return victim

    def _by_yield(self, slots: Int64) -> npt.NDArray[np.intp]:
        """Places in `slots`, those first that free most tokens for what they still take."""
        return np.argsort(self._expectations.way_to_go(slots) / self._sequences.length[slots], kind="stable")

    def _look(self) -> None:
        """Decide which samples wait from now on: none if all can finish, or as long as enough can."""
        seq, order = self._sequences, self._sequences.order
        by_yield = self._by_yield(order)
        number = self._can_finish(by_yield)
        self._holding = number < len(order) and (self._holding or number < FEW * len(order)) and number > 0
        self._held_epoch.fill(-1)
        if self._holding:
            held = order[by_yield[number:]]
            self._held_epoch[held] = seq.epoch[held]

    def _can_finish(self, by_yield: npt.NDArray[np.intp]) -> int:
        """How many of the running samples, taken in this order, can run to their expected ends if the others stand still."""
        seq, order = self._sequences, self._sequences.order
        rank = np.empty(len(order), np.int32)
        rank[by_yield] = np.arange(len(order), dtype=np.int32)
        remaining = self._expectations.remaining(order)
        # A prompt's pages come free behind the last of its samples, and with that one only.
        held_rank = self._prompts.last_steps(seq.request[order], rank + 1) - 1
        held_until = self._prompts.last_steps(seq.request[order], remaining)
        return finishing(
            free=self._pool.num_free,
            page_size=self._page_size,
            rank=np.concatenate((rank, held_rank)),
            end=np.concatenate((remaining, held_until)).astype(np.int64),
            pages=np.concatenate((seq.num_pages[order] - seq.shared_pages[order], self._prompts.neighbours.attributed())),
            grows=np.arange(len(order) + len(held_rank)) < len(order),
        )


def finishing(free: int, page_size: int, rank: Int32, end: Int64, pages: Int32, grows: Bool) -> int:
    """How many samples can run to their ends when only those of a rank below that number go on.

    Entry i holds `pages[i]` pages, to be freed at step `end[i]` from now if its rank is below the number asked for; where it
    `grows` it is a sample and takes one page in `page_size` steps until then. The number is found by bisection, to one part
    in 64 and from below: never one that does not fit."""
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
