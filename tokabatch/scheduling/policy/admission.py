"""Which waiting samples join the next step.

Candidates are admitted in their order while running limit, token budget, pages and the forecast of page use allow; a later one
never overtakes an earlier one that does not fit, so no sample starves.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from tokabatch.messages import Int32, Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.page_pool import PagePool
from tokabatch.scheduling.kv.prefix_tree import OpenPrompt, OpenPrompts
from tokabatch.scheduling.kv.slots import Sequences
from tokabatch.scheduling.lengths.estimates import Expectations
from tokabatch.scheduling.lengths.page_forecast import Claims, Forecast
from tokabatch.scheduling.policy.waiting_queue import Candidates, Waiting
from tokabatch.scheduling.step_builder import StepDraft
from tokabatch.scheduling.work import Work

FORECAST_STEPS = 8
"""A forecast with pages to spare for every candidate at its longest serves for so many steps."""

Runs = tuple[Int64, Int32]
"""Slots and the tokens each computes in the step."""

_NONE: Runs = (np.zeros(0, np.int64), np.zeros(0, np.int32))


class Admission:
    """Opens slots for waiting samples. Shares the scheduler's books: it alone adds to them, the scheduler removes."""

    def __init__(
        self,
        work: Work,
        page_size: int,
        pool: PagePool,
        prompts: OpenPrompts,
        sequences: Sequences,
        counts: SchedulerCounts,
        expectations: Expectations,
    ) -> None:
        self._work = work
        self._page_size = page_size
        self._pool = pool
        self._prompts = prompts
        self._sequences = sequences
        self._counts = counts
        self._expectations = expectations
        self.waiting = Waiting(work, prompts, sequences)
        self._surely_free = self._steps_good_for = 0
        """Pages free at every future step by the last forecast, less all that came in since; and for how long to rely on it."""
        self._asked_from, self._asked_lengths = 0, np.zeros(0, np.int32)
        """The number of this step's first admission, and the lengths predicted for it and those to follow."""

    def admit(self, budget: int, draft: StepDraft, alone: bool) -> Runs:
        """Open slots for as many candidates as fit and return their runs. `alone`: nothing runs or is in flight, so the first
        candidate must come in whatever the forecast says."""
        if self._expectations.refresh():
            self.forecast_anew()
        if budget <= 0 or not self._sequences.num_free:
            return _NONE
        candidates = self.waiting.candidates(budget, draft.index)
        if not len(candidates.request):
            return _NONE
        counts = self._fitting(candidates)
        if alone:
            counts[0] = max(1, counts[0])
        taken, complete = self._admit_known(candidates, counts, budget, draft)
        if complete:
            budget -= sum(int(takes.sum()) for _, takes in taken)
            fresh = counts[candidates.num_known :]
            count = len(fresh) if fresh.all() else int(np.argmin(fresh > 0))
            if count and budget > 0 and self._sequences.num_free:
                taken.append(self._admit_fresh(min(count, self._sequences.num_free), budget, draft))
        runs = [np.concatenate(part) for part in zip(_NONE, *taken, strict=True)]
        if alone and not len(runs[0]) and self._prompts.suspend_idle(keep=int(candidates.request[0])):
            return self._admit_first(candidates, budget, draft)
        return runs[0], runs[1]

    def _admit_first(self, candidates: Candidates, budget: int, draft: StepDraft) -> Runs:
        """Admit again after all other idle prompts have given up their pages. A first candidate that has been open before is
        the only one: else a prompt just suspended would stand before it and take the pages that came free for it."""
        before = self.waiting.confined
        if candidates.num_known:
            self.waiting.confined = frozenset((int(candidates.request[0]),))
        runs = self.admit(budget, draft, alone=True)
        self.waiting.confined = before
        return runs

    def forecast_anew(self) -> None:
        """The last forecast holds no more: other pages, or other samples that wait."""
        self._steps_good_for = 0

    def take_back(self, slot: int) -> None:
        """Put a running sample back among the waiting; the tokens received are kept."""
        seq = self._sequences
        prompt, sample = self._prompts[int(seq.request[slot])], int(seq.sample[slot])
        self.waiting.preempted[prompt.request, sample] = seq.read(np.array([slot]))[0]
        self._prompts.requeue(prompt, sample)
        self.stop(np.array([slot], np.int64))
        if prompt.tainted:
            self._prompts.release([], [prompt])

    def stop(self, slots: Int64) -> None:
        """Close the slots of running samples, which leave no output behind."""
        self.forecast_anew()
        for slot, request in zip(slots.tolist(), self._sequences.request[slots].tolist(), strict=True):
            prompt = self._prompts[request]
            if prompt.leader == slot:
                prompt.leader = -1
            prompt.live -= 1
        self._sequences.close(slots)

    def _fitting(self, candidates: Candidates) -> Int32:
        """How many samples of each candidate fit the pool at every future step."""
        size, entries = self._page_size, candidates.request
        request = np.repeat(entries, candidates.counts)
        produced, sample = np.repeat(candidates.produced, candidates.counts), self.waiting.sample_numbers(candidates)
        ticket = self._sequences.num_admissions + np.arange(len(request))
        length = self._work.length[request]
        full, total = (length - 1) // size, -(-length // size)
        closed = np.ones(len(entries), np.bool_)
        closed[: candidates.num_known] = [entry not in self._prompts for entry in entries[: candidates.num_known].tolist()]
        opens = np.repeat(closed, candidates.counts)
        self._asked_from = self._sequences.num_admissions
        self._asked_lengths = self._expectations.predict(request, sample, produced, ticket)
        claims = Claims(
            computed=length - 1 + produced,
            shared=np.where(opens, total, full),
            remaining=self._asked_lengths - produced,
            prompt_pages=np.where(opens, total - np.minimum(self._work.lcp[request] // size, full), 0),
        )
        peak = claims.peak(size)
        self._steps_good_for -= 1
        if self._steps_good_for > 0 and peak <= self._surely_free:
            self._surely_free -= peak
            return candidates.counts
        deviations = self._expectations.deviations
        forecast = self._forecast(claims.remaining)
        fitting = forecast.admit(self._pool.num_pages, claims, deviations)
        self._surely_free = forecast.spare(self._pool.num_pages, deviations) - peak
        self._steps_good_for = FORECAST_STEPS
        before = np.cumsum(candidates.counts) - candidates.counts
        return np.clip(fitting - before, 0, candidates.counts).astype(np.int32)

    def _forecast(self, also: Int32) -> Forecast:
        """Page use of what runs and of the open prompts."""
        seq = self._sequences
        order = seq.order
        remaining = self._expectations.remaining(order)
        running = Claims(
            # A prompt under way is taken as computed: what its length holds is claimed from the start.
            computed=np.maximum(seq.length[order] - 1, 0),
            shared=seq.shared_pages[order],
            remaining=remaining,
            prompt_pages=np.zeros(len(order), np.int32),
        )
        held_steps = self._prompts.last_steps(seq.request[order], remaining)
        return Forecast(self._page_size, running, self._prompts.neighbours.attributed(), held_steps, also)

    def _admit_known(self, candidates: Candidates, counts: Int32, budget: int, draft: StepDraft) -> tuple[list[Runs], bool]:
        """Admit samples of prompts that have been open before; and whether all that asked got a sample in."""
        taken: list[Runs] = []
        requests, prompts = candidates.request[: candidates.num_known].tolist(), self._prompts
        forks = [request in prompts and prompts[request].can_fork(draft.index) for request in requests]
        for forking, group in groupby(range(len(requests)), forks.__getitem__):
            places = list(group)
            if forking:
                asked, produced = counts[places], candidates.produced[places]
                # A sample takes a slot, a page, and a token besides those that it computes again.
                room = min(self._sequences.num_free, self._pool.num_free) - (np.cumsum(asked) - asked)
                tokens = budget - np.cumsum(asked * (produced + 1)) + asked * (produced + 1)
                enter = np.clip(np.minimum(room, tokens), 0, asked)
                count = len(enter) if enter.all() else int(np.argmin(enter > 0))
                if count:
                    taken.append(self._fork([prompts[requests[i]] for i in places[:count]], enter[:count], budget, draft))
                    budget -= int(taken[-1][1].sum())
                if count < len(enter):
                    return taken, False
                continue
            for i in places:
                if counts[i] <= 0 or budget <= 0 or not self._sequences.num_free:
                    return taken, False
                prompt = prompts[requests[i]] if requests[i] in prompts else prompts.reopen(requests[i])
                if prompt is None:
                    return taken, False
                taken.append(self._lead([prompt], budget, draft))
                budget -= int(taken[-1][1].sum())
        return taken, True

    def _admit_fresh(self, count: int, budget: int, draft: StepDraft) -> Runs:
        """Open the next prompts and admit the first sample of each."""
        opened = self._prompts.open_next(count, budget)
        return self._lead(opened, budget, draft) if opened else _NONE

    def _lead(self, prompts: list[OpenPrompt], budget: int, draft: StepDraft) -> Runs:
        """Admit one sample of each prompt, which computes the prompt in the prompt's own pages."""
        requests = np.array([prompt.request for prompt in prompts], np.int32)
        slots = self._sequences.open(requests, np.array([prompt.take_sample() for prompt in prompts], np.int32))
        counts = np.array([len(prompt.pages) for prompt in prompts], np.int32)
        draft.set_pages(self._sequences.share_pages(slots, counts, np.concatenate([p.pages for p in prompts])))
        self._fill(slots, requests, np.array([prompt.computed for prompt in prompts], np.int32))
        for prompt, slot in zip(prompts, slots.tolist(), strict=True):
            prompt.leader = slot
            prompt.live += 1
        return self._start(slots, budget, draft)

    def _fork(self, prompts: list[OpenPrompt], counts: Int32, budget: int, draft: StepDraft) -> Runs:
        """Admit `counts[i]` samples of each computed prompt: they read its full pages in place, and copy its last one where
        that is filled in part."""
        seq, count = self._sequences, int(counts.sum())
        samples = np.fromiter(
            (prompt.take_sample() for prompt, number in zip(prompts, counts.tolist(), strict=True) for _ in range(number)),
            np.int32,
            count,
        )
        requests = np.repeat(np.array([prompt.request for prompt in prompts], np.int32), counts)
        slots = seq.open(requests, samples)
        full = np.array([prompt.full for prompt in prompts], np.int32)
        pages = np.concatenate([prompt.pages[: prompt.full] for prompt in prompts])
        shared = np.repeat(full, counts)
        # Each sample's span of `pages` is that of its prompt.
        first = np.repeat(np.cumsum(full) - full, counts) - (np.cumsum(shared) - shared)
        draft.set_pages(seq.share_pages(slots, shared, pages[np.arange(int(shared.sum())) + np.repeat(first, shared)]))
        last = self._work.length[requests] - 1
        self._fill(slots, requests, last)
        for prompt, number in zip(prompts, counts.tolist(), strict=True):
            prompt.live += number
        runs = self._start(slots, budget, draft)
        begun = last % self._page_size > 0
        if begun.any():
            tail = [prompt.pages[prompt.full] if prompt.full < len(prompt.pages) else 0 for prompt in prompts]
            draft.copy_pages(np.repeat(np.array(tail, np.int32), counts)[begun], seq.page_table[slots[begun], shared[begun]])
        return runs

    def _start(self, slots: Int64, budget: int, draft: StepDraft) -> Runs:
        """Give freshly opened slots their first tokens and the pages for them; each gets the page of its first token even
        when the budget leaves it none to compute yet."""
        seq = self._sequences
        pending = seq.length[slots] - seq.computed[slots]
        take = np.clip(budget - (np.cumsum(pending) - pending), 0, pending).astype(np.int32)
        needs = seq.missing_pages(slots, np.maximum(take, 1))
        if int(needs.sum()) > self._pool.num_free:
            # Preempted samples come back long: begin with one token each, which needs one page at most.
            take = np.minimum(take, 1)
            needs = seq.missing_pages(slots, np.ones_like(take))
        draft.set_pages(seq.add_pages(slots, needs))
        draft.open_slots(slots)
        return slots[take > 0], take[take > 0]

    def _fill(self, slots: Int64, requests: Int32, start: Int32) -> None:
        """Set the columns of freshly opened slots; preempted samples get their output back."""
        seq, counts = self._sequences, self._counts
        length = self._work.length[requests]
        params = self._work.params[requests]
        seq.prompt_length[slots] = seq.length[slots] = length
        seq.params[slots], seq.limit[slots] = params, self._work.max_tokens[params]
        seq.outputs.open(slots, self._work.logprobs[params])
        seq.computed[slots] = seq.cached_tokens[slots] = start
        seq.expected[slots] = self._asked_lengths[seq.admitted[slots] - self._asked_from]
        counts.prompt_tokens += int(length.sum())
        counts.cached_tokens += int(start.sum())
        if not self.waiting.preempted:
            return
        for i, slot in enumerate(slots.tolist()):
            output = self.waiting.preempted.pop((int(requests[i]), int(seq.sample[slot])), None)
            if output is not None:
                counts.prompt_tokens -= int(length[i])
                counts.cached_tokens -= int(start[i])
                seq.restore(slot, output)
                seq.length[slot] += len(output.tokens)
                counts.recomputed_tokens += int(seq.length[slot] - start[i])
