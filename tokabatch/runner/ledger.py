"""The record of which member of a fleet holds which samples of a plan, with one entry for each sample, kept by main.

Members receive *runs*: consecutive samples of the plan, cut where the prompts on either side of the cut share the shortest
prefix. The first runs are large and later ones become smaller (guided self-scheduling, Polychronopoulos and Kuck 1987), so that
the members finish together; a prompt with many samples may be cut between samples. The samples that a member gives back, and
those of a lost member, are free again. The rules for when a member gets more work and how much one member gives another are
also here; a simulated run uses the same rules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.errors import EngineError
from tokabatch.scheduling.completion_batch import Completions, sample_keys
from tokabatch.scheduling.contracts import Requests

FREE, DONE, WITHHELD, NOT_BEGUN, CANCELLED = -1, -2, -3, -4, -5
"""States of samples that no member holds: free, finished, not offered yet, not allowed to begin yet, and cancelled."""
NOT_LEFT = (DONE, WITHHELD, CANCELLED)
"""The states that do not count as left."""
SMALLEST = 64
"""A run is at least the plan's cost divided by this and the number of members."""
SPLIT_WORTH = 8
"""A prompt's samples may be divided between two runs if those on either side cost at least this many times as much as the
prompt."""
LEAST_WAITING, REFILL = 16, 1 / 4
"""A member requests more work when fewer samples are waiting than this, or than this share of the running ones."""


def wants_more(waiting: int, running: int) -> bool:
    """Return whether a member with these numbers of samples requests more."""
    return waiting < max(LEAST_WAITING, REFILL * running)


def to_give(work: float, waiting: int, wanting: float) -> int:
    """Return how many of its `waiting` samples a member with this `work` gives to one with the work `wanting`, so that both
    then have the same (`Ledger.work`). Running samples are counted on both sides: a member whose batch is full has no use for
    samples that another is about to admit."""
    return max(0, min(math.ceil((work - wanting - 1) / 2), waiting))


@dataclass(frozen=True, slots=True)
class Part:
    """Samples of a plan: for each of the `prompts`, numbers in plan order, the samples from `first` up to `stop`. A prompt
    occurs several times if its samples are not consecutive."""

    prompts: Int32
    first: Int32
    stop: Int32

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Return the union of the parts, in plan order."""
        empty = np.zeros(0, np.int32)
        prompts = np.concatenate([empty, *(part.prompts for part in parts)])
        first = np.concatenate([empty, *(part.first for part in parts)])
        stop = np.concatenate([empty, *(part.stop for part in parts)])
        order = np.lexsort((first, prompts))
        return cls(prompts[order], first[order], stop[order])

    def __len__(self) -> int:
        """Return the number of samples."""
        return int((self.stop - self.first).sum(dtype=np.int64))


class Ledger:
    """The record for a plan over R prompts. Samples that were drawn before are not in `plan` and count as finished. With
    `withheld`, no sample can be given out, or counts as left, before it is offered."""

    def __init__(self, requests: Requests, begun: Int64 | None = None, *, withheld: bool = False) -> None:
        """`begun` is the number of samples of each row that may begin, shape [rows]; None is all of them."""
        self.plan = replace(requests, drawn=None)
        wanted = self.plan.num_samples()
        self._offset: Int64 = np.concatenate((np.zeros(1, np.int64), np.cumsum(wanted)))
        """The index of each prompt's first sample among all samples."""
        self._holder = np.full(int(self._offset[-1]), FREE, np.int16)
        self._place: Int64 | None = None
        """The index of each sample among those of the whole job, as in `Drawn`."""
        if requests.drawn is not None:
            place = np.repeat(requests.drawn.start[requests.row_index] - self._offset[:-1], wanted)
            place += np.arange(len(place))
            self._holder[requests.drawn.flags[place]] = DONE
            self._place = place if withheld else None
        if withheld:
            self._holder[self._holder == FREE] = WITHHELD
        if begun is not None:
            number = np.arange(len(self._holder)) - np.repeat(self._offset[:-1], wanted)
            late = number >= np.repeat(begun[self.plan.row_index], wanted)
            self._holder[late & (self._holder == FREE)] = NOT_BEGUN
        sampling, params = self.plan.sampling, self.plan.params
        self._output: Int64 = np.array([kind.max_tokens for kind in sampling], np.int64)[params]
        """The most tokens that a sample of each prompt may generate."""
        self._prompt_of: Int32 = np.zeros(int(self.plan.row_index.max(initial=-1)) + 1, np.int32)
        """The number in the plan of each row's prompt."""
        self._prompt_of[self.plan.row_index] = np.arange(len(self.plan), dtype=np.int32)
        left = np.isin(self._holder, NOT_LEFT, invert=True)
        self._left_of: Int64 = np.add.reduceat(left, self._offset[:-1], dtype=np.int64)
        self.left = int(self._left_of.sum())
        """The number of samples that are neither finished nor cancelled."""
        kinds, counts = np.unique(self._holder, return_counts=True)
        self._held = Counter(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))
        self._headway: dict[int, float] = {}
        """The headway that was noted for each member."""
        self._done = 0.0
        """The sum of them."""
        self.finished_prompts = 0
        self._each = self._output + (self.plan.length - self.plan.lcp) / np.maximum(wanted, 1)
        """The most tokens that a sample of each prompt costs, with its share of the prompt's tokens; float64, shape [R]."""
        free = np.add.reduceat(self._holder == FREE, self._offset[:-1], dtype=np.int64) if self.left else np.zeros(0)
        self._free_cost = float((self._each * free).sum()) if self.left else 0.0
        """The cost of all free samples."""
        self._front = 0
        """No sample before this index is free."""
        self._cost = self._free_cost
        """The largest cost that was free at any time."""

    def offer(self, wanted: Bool) -> None:
        """Make the marked samples free if they are withheld. `wanted` has a flag for each sample of the whole job, as in
        `Drawn`."""
        self._exchange(wanted, WITHHELD, FREE)

    def withhold(self, wanted: Bool) -> None:
        """Withhold the marked samples again if they are free."""
        self._exchange(wanted, FREE, WITHHELD)

    def _exchange(self, wanted: Bool, before: int, after: int) -> None:
        assert self._place is not None, "only samples of a ledger that withholds them are offered"
        self._change(np.flatnonzero((self._holder == before) & wanted[self._place]), after)
        self._cost = max(self._cost, self._free_cost)

    @property
    def has_free(self) -> bool:
        """Whether any sample is free."""
        return self._held[FREE] > 0

    def prompts(self, rows: Sequence[int] | Int64) -> Int32:
        """Return the numbers in the plan of these rows' prompts."""
        return self._prompt_of[rows]

    def part(self, requests: Requests) -> Part:
        """Return the part of this plan that a scheduler's `requests` describe."""
        assert requests.span is not None
        return Part(self.prompts(requests.row_index), *requests.span)

    def next_run(self, member: int, members: int, *, whole: bool = False) -> Part | None:
        """Return the next run for a member and record that it holds it. Return None if nothing is free, or if the member
        already has its share of the work that is left, given the number of `members`. With `whole`, return all that is
        free."""
        held = self.held(member)
        share = max(math.ceil((self.left - self._done) / members - self.work(member)), int(not held))
        if not self.has_free or (share <= 0 and not whole):
            return None
        if whole:
            free, _ = self._free_front(math.inf)
        else:
            least = self._cost / (SMALLEST * members)
            wanted = max(self._free_cost / (2 * members), least)
            free, costs = self._free_front(2 * wanted)
            limit = float(np.interp(share, np.append(0, np.cumsum(free.stop - free.first)), costs))
            if held and limit < min(least, self._free_cost / members):
                return None
            free = self._cut(free, costs, min(wanted, limit), limit)
        self.take_over(member, free)
        self._front = int(self._offset[free.prompts[-1]] + free.stop[-1])
        return free

    def _free_front(self, cost: float) -> tuple[Part, Int64]:
        """Return the first free samples in plan order, of at least this cost if there are enough, and the costs of their pieces
        as in `_costs`. At least one sample must be free."""
        size = 64 + int(1.5 * self._held[FREE] * min(1.0, cost / self._free_cost))
        while True:
            stop = int(self._offset[min(np.searchsorted(self._offset, self._front + size), len(self._offset) - 1)])
            free = self._free_parts(self._front, stop)
            costs = self._costs(free)
            if costs[-1] >= cost or len(free) == self._held[FREE]:
                return free, costs
            size *= 4

    def take_over(self, member: int, part: Part) -> None:
        """Record that a member holds this part from now on, whichever member held it before."""
        self._change(self._places(part), member)

    def finish(self, member: int | Int64, completions: Completions) -> None:
        """Record that a member, or the member given for each sample, has finished these samples; cancelled ones are not
        counted. Raises EngineError for a sample that the member does not hold."""
        if not len(completions):
            return
        rows, samples = sample_keys(completions)
        prompts = self.prompts(rows)
        places = self._offset[prompts] + samples
        holders = np.broadcast_to(np.int64(member), len(places))
        wanted = self._holder[places] != CANCELLED
        if not wanted.all():
            prompts, places, holders = prompts[wanted], places[wanted], holders[wanted]
        if (self._holder[places] != holders).any() or len(np.unique(places)) < len(places):
            raise EngineError("a sample was finished that its replica does not hold; please report this with the job file")
        self._change(places, DONE, prompts)

    def give_back(self, member: int, part: Part | None = None) -> int:
        """Make what a member holds, or this part of it, free again, and return the number of samples."""
        if part is not None:
            # Except for samples that have been cancelled meanwhile.
            places = self._places(part)
            places = places[self._holder[places] == member]
        else:
            places = np.flatnonzero(self._holder == member)
            self.note_headway(member, 0.0)
        self._change(places, FREE)
        return len(places)

    def begin(self, row: int, until: int) -> None:
        """Allow the samples of a row before number `until` to begin."""
        prompt = int(self.prompts([row])[0])
        places = np.arange(self._offset[prompt], min(self._offset[prompt] + until, self._offset[prompt + 1]))
        self._change(places[self._holder[places] == NOT_BEGUN], FREE)

    def cancel(self, row: int, first: int) -> list[int]:
        """Cancel the samples of a row from number `first` on; return the members that hold some of them."""
        prompt = int(self.prompts([row])[0])
        places = np.arange(self._offset[prompt] + first, self._offset[prompt + 1])
        places = places[(self._holder[places] != DONE) & (self._holder[places] != CANCELLED)]
        holders = np.unique(self._holder[places])
        self._change(places, CANCELLED)
        return holders[holders >= 0].tolist()

    def held(self, member: int) -> int:
        """Return the number of samples that a member holds."""
        return self._held[member]

    def note_headway(self, member: int, headway: float) -> None:
        """Record a member's `Scheduler.headway`, which leaves out the samples that it has finished by now."""
        self._done += headway - self._headway.get(member, 0.0)
        self._headway[member] = headway

    def work(self, member: int) -> float:
        """Return the work that a member holds, in samples: nearly finished ones count as less than one, and such as take longer
        than others as more (`Scheduler.headway`)."""
        held = self.held(member)
        return max(0.0, held - self._headway.get(member, 0.0)) if held else 0.0

    def others(self, member: int, prompts: Int32) -> tuple[Part, Int64]:
        """Return the free part of these prompts, and the other members that hold samples of them."""
        elsewhere = np.concatenate([np.arange(*self._offset[[prompt, prompt + 1]]) for prompt in np.unique(prompts).tolist()])
        holders = np.unique(self._holder[elsewhere])
        free = self._free_parts()
        mine = np.isin(free.prompts, prompts)
        part = Part(free.prompts[mine], free.first[mine], free.stop[mine])
        return part, holders[(holders >= 0) & (holders != member)].astype(np.int64)

    def _places(self, part: Part) -> Int64:
        count = (part.stop - part.first).astype(np.int64)
        begin = self._offset[part.prompts] + part.first
        return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))

    def _change(self, places: Int64, holder: int, prompts: Int64 | Int32 | None = None) -> None:
        """Set the holder of the samples at these places, and update all counts. `prompts` are their prompts, one for each."""
        if not len(places):
            return
        if prompts is None:
            prompts = np.searchsorted(self._offset, places, side="right") - 1
        before, each = self._holder[places], self._each[prompts]
        kinds, counts = np.unique(before, return_counts=True)
        self._held.subtract(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))
        self._held[holder] += len(places)
        self._holder[places] = holder
        self._free_cost += float(each.sum() * (holder == FREE) - each[before == FREE].sum())
        if holder == FREE:
            self._front = min(self._front, int(places.min()))
        change = int(holder not in NOT_LEFT) - np.isin(before, NOT_LEFT, invert=True).astype(np.int64)
        if change.any():
            np.add.at(self._left_of, prompts, change)
            self.left += int(change.sum())
            if holder in (DONE, CANCELLED):
                self.finished_prompts += int(np.count_nonzero(self._left_of[np.unique(prompts)] == 0))

    def _free_parts(self, begin: int = 0, stop: int | None = None) -> Part:
        """Return the free samples from index `begin` up to `stop`, in as few pieces as possible."""
        free = self._holder[begin:stop] == FREE
        begins, ends = free.copy(), free.copy()
        begins[1:] &= ~free[:-1]
        ends[:-1] &= ~free[1:]
        # No piece extends over two prompts.
        within = np.searchsorted(self._offset, (begin + 1, begin + len(free)))
        edges = self._offset[within[0] : within[1]] - begin
        begins[edges] = free[edges]
        ends[edges - 1] = free[edges - 1]
        first, last = np.flatnonzero(begins) + begin, np.flatnonzero(ends) + begin
        prompts = (np.searchsorted(self._offset, first, side="right") - 1).astype(np.int32)
        offset = self._offset[prompts]
        return Part(prompts, (first - offset).astype(np.int32), (last + 1 - offset).astype(np.int32))

    def stretches(self, count: int) -> list[Part]:
        """Return all that is free, cut into about `count` parts of similar cost, where prompts share the shortest prefixes."""
        free, cut = self._free_parts(), list[Part]()
        costs = self._costs(free)
        each, place, first = max(1.0, float(costs[-1]) / count), 0, free.first.copy()
        while place < len(free.prompts):
            # As much as a cut looks at.
            end = min(len(free.prompts), int(np.searchsorted(costs, costs[place] + 2 * each)) + 1)
            # What is cut off keeps its own numbers: those of the rest change below.
            near = Part(free.prompts[place:end], first[place:end].copy(), free.stop[place:end])
            front = self._cut(near, self._costs(near), each, 1.5 * each)
            cut.append(front)
            place += len(front.prompts)
            if front.stop[-1] < free.stop[place - 1]:
                place -= 1
                first[place] = front.stop[-1]
        return cut

    def samples(self, part: Part) -> tuple[Int64, Int64]:
        """Return the row and the number of each sample of a part, shape [N] each."""
        count = (part.stop - part.first).astype(np.int64)
        first = np.repeat(part.first - (np.cumsum(count) - count), count)
        return np.repeat(self.plan.row_index[part.prompts], count), first + np.arange(int(count.sum()))

    def _costs(self, part: Part) -> Int64:
        """Return the cumulative cost in tokens of the pieces of a part, beginning with 0: shape [pieces + 1]."""
        prompts = part.prompts
        own = np.where(np.diff(prompts, prepend=-1) > 0, self.plan.length[prompts] - self.plan.lcp[prompts], 0)
        return np.append(0, np.cumsum(own + (part.stop - part.first) * self._output[prompts]))

    def _cut(self, part: Part, costs: Int64, wanted: float, limit: float) -> Part:
        """Return the front of a part, of about the cost `wanted` and at most `limit`, but at least one sample."""
        prompts = part.prompts
        inside = np.flatnonzero((costs[1:] >= wanted / 2) & (costs[1:] <= min(1.5 * wanted, limit))) + 1
        if costs[-1] <= limit and costs[-1] <= 1.5 * wanted:
            pieces = len(prompts)
        elif len(inside):
            same = np.append(prompts[1:] == prompts[:-1], False)[inside - 1]
            behind = np.append(prompts, prompts[-1])[inside]
            shared = np.where(same, self.plan.length[behind], self.plan.lcp[behind])
            pieces = int(inside[np.lexsort((np.abs(costs[inside] - wanted), shared))[0]])
        else:
            # One prompt takes more than is wanted.
            place = max(0, int(np.searchsorted(costs, wanted, side="right")) - 1)
            place = min(place, len(prompts) - 1)
            first, stop, each = int(part.first[place]), int(part.stop[place]), int(self._output[prompts[place]])
            count = round((wanted - int(costs[place])) / each)
            worth = SPLIT_WORTH * int(self.plan.length[prompts[place]]) // each
            if max(1, worth) <= count <= stop - first - max(1, worth):
                taken = part.stop[: place + 1].copy()
                taken[-1] = first + count
                return Part(prompts[: place + 1], part.first[: place + 1], taken)
            pieces = max(1, place + (count > (stop - first) // 2))
        return Part(prompts[:pieces], part.first[:pieces], part.stop[:pieces])
