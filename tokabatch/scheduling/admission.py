"""Which waiting samples join the next step.

Candidates stand in plan order: prompts whose pages had to be given up, then open prompts with samples left, then prompts
never opened. They are admitted in that order while running limit, token budget, pages and the forecast of page use allow;
a later candidate never overtakes an earlier one that does not fit, so no sample starves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np

from tokabatch.messages import Bool, Int32, Int64, Requests
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.forecast import Claims, Forecast
from tokabatch.scheduling.lengths import Caution, LengthModel, LengthPredictor
from tokabatch.scheduling.pages import PagePool
from tokabatch.scheduling.prompts import OpenPrompt, OpenPrompts
from tokabatch.scheduling.sequences import Generated, Sequences
from tokabatch.scheduling.stepping import StepDraft

MAX_FRESH = 256
"""Prompts opened in one step at most."""

LEARNED_SAMPLES = 8
"""A prompt's own lengths are learned where it has at least so many samples."""

FORECAST_STEPS = 8
"""A forecast with pages to spare for every candidate at its longest serves for so many steps."""

Runs = tuple[Int64, Int32]
"""Slots and the tokens each computes in the step."""

_NONE: Runs = (np.zeros(0, np.int64), np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Arrays over candidates: `counts[i]` samples of `request[i]`, each with `produced[i]` output tokens from before it was
    preempted; the first `num_known` are of prompts that have been open before."""

    request: Int32
    counts: Int32
    produced: Int32
    num_known: int


class Admission:
    """Opens slots for waiting samples. Shares the scheduler's books: it alone adds to them, the scheduler removes."""

    def __init__(
        self,
        requests: Requests,
        page_size: int,
        pool: PagePool,
        prompts: OpenPrompts,
        sequences: Sequences,
        counts: SchedulerCounts,
        lengths: LengthPredictor | None,
    ) -> None:
        """`lengths` replaces the learned predictions."""
        self._requests = requests
        self._page_size = page_size
        self._pool = pool
        self._prompts = prompts
        self._sequences = sequences
        self._counts = counts
        sampling = requests.sampling
        self._max_tokens = np.array([p.max_tokens for p in sampling], np.int32)
        self._fixed_length = np.array([p.ignore_eos and not p.stop and not p.stop_token_ids for p in sampling], np.bool_)
        self._share = np.bincount(requests.params, weights=requests.num_samples(), minlength=len(sampling))
        """Samples to draw with each kind of sampling parameters."""
        self._kinds = list(zip(self._max_tokens.tolist(), self._fixed_length.tolist(), strict=True))
        self._all_fixed = bool(self._fixed_length.all()) and lengths is None
        self._model = LengthModel(int(self._max_tokens.max(initial=1)), requests.num_samples() >= LEARNED_SAMPLES)
        self._lengths: LengthPredictor = lengths or self._model
        self._caution = Caution()
        self._surely_free = self._steps_good_for = 0
        """Pages free at every future step by the last forecast, less all that came in since; and for how long to rely on it."""
        self._asked_from, self._asked_lengths = 0, np.zeros(0, np.int32)
        """The number of this step's first admission, and the lengths predicted for it and those to follow."""
        self.preempted: dict[tuple[int, int], Generated] = {}
        """Output of preempted samples by (request, sample)."""
        self.confined: frozenset[int] | None = None
        """The only requests that may come in; None is all."""

    def admit(self, budget: int, draft: StepDraft, alone: bool) -> Runs:
        """Open slots for as many candidates as fit and return their runs. `alone`: nothing runs or is in flight, so the first
        candidate must come in whatever the forecast says."""
        self._tune()
        if budget <= 0 or not self._sequences.num_free:
            return _NONE
        candidates = self._candidates(budget, draft.index)
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

    def _admit_first(self, candidates: _Candidates, budget: int, draft: StepDraft) -> Runs:
        """Admit again after all other idle prompts have given up their pages. A first candidate that has been open before is
        the only one: else a prompt just suspended would stand before it and take the pages that came free for it."""
        before = self.confined
        if candidates.num_known:
            self.confined = frozenset((int(candidates.request[0]),))
        runs = self.admit(budget, draft, alone=True)
        self.confined = before
        return runs

    def expected_tokens_left(self, waiting: int) -> int:
        """Output tokens still to come: of the running samples, and of `waiting` more at the workload's mean."""
        seq, model = self._sequences, self._model
        order = seq.order
        limit, known = seq.limit[order], self._so_far(order)
        expected = model.predict(seq.request[order], seq.sample[order], known, limit, seq.admitted[order])
        total = int((np.where(self._fixed_length[seq.params[order]], limit, expected) - seq.generated[order]).sum())
        if not waiting:
            return total
        means = [limit if fixed else model.mean_length(limit) for limit, fixed in self._kinds]
        return total + round(waiting * float(np.average(means, weights=self._share)))

    def way_to_go(self, slots: Int64) -> Int32:
        """Output tokens that such samples typically still have to come, at least 1."""
        seq = self._sequences
        known, limit = self._so_far(slots), seq.limit[slots]
        typical = (
            seq.expected[slots] if self._lengths is not self._model else self._model.typical(seq.request[slots], known, limit)
        )
        return np.maximum(np.where(self._fixed_length[seq.params[slots]], limit, typical) - known, 1)

    def remaining(self, slots: Int64) -> Int32:
        """Output tokens that each sample, by the length it is taken to have, still has to come; at least 1."""
        return np.maximum(self._sequences.expected[slots] - self._so_far(slots), 1)

    def forecast_anew(self) -> None:
        """The last forecast holds no more: other pages, or other samples that wait."""
        self._steps_good_for = 0

    def take_back(self, slot: int) -> None:
        """Put a running sample back among the waiting; the tokens received are kept."""
        seq = self._sequences
        prompt, sample = self._prompts[int(seq.request[slot])], int(seq.sample[slot])
        self.forecast_anew()
        logprobs = self._requests.sampling[int(seq.params[slot])].logprobs
        self.preempted[prompt.request, sample] = seq.output(slot, -1 if logprobs is None else logprobs)
        if prompt.leader == slot:
            prompt.leader = -1
        self._prompts.requeue(prompt, sample)
        prompt.live -= 1
        seq.close(np.array([slot], np.int64))

    def ended(self, slots: Int64, stopped: Bool) -> None:
        """These slots' samples are finished; `stopped` where the model ended them, not the limit."""
        if self._all_fixed:
            return
        seq = self._sequences
        self._lengths.observe(seq.request[slots], seq.generated[slots], stopped)

    def forget(self, requests: list[int]) -> None:
        """All samples of these prompts are finished."""
        self._model.forget(requests)

    def _tune(self) -> None:
        """Once a step: renew the predictions where more is known by now. Where every length is given nothing is predicted."""
        if self._all_fixed:
            return
        seq, counts = self._sequences, self._counts
        order = seq.order
        self._caution.update(counts.output_tokens + counts.prefilled_tokens, counts.given_up_tokens)
        known = self._so_far(order)
        if self._lengths.refresh(seq.request[order], known):
            due, self._steps_good_for = order, 0
        else:
            due = order[(seq.expected <= seq.length - seq.prompt_length)[order]]
        if len(due):
            seq.expected[due] = self._predict(seq.request[due], seq.sample[due], self._so_far(due), seq.admitted[due])

    def _candidates(self, budget: int, step: int) -> _Candidates:
        known, free, budget = self._known(budget, step)
        first = self._prompts.next_request
        fresh = np.arange(first, min(first + min(max(free, 0), MAX_FRESH), len(self._requests)), dtype=np.int32)
        cost = np.cumsum(self._requests.length[fresh] - self._requests.lcp[fresh])
        none = budget <= 0 or self.confined is not None
        fresh = fresh[:0] if none else fresh[: int(np.searchsorted(cost, budget)) + 1]
        return _Candidates(
            request=np.concatenate((np.array([k[0] for k in known], np.int32), fresh)),
            counts=np.concatenate((np.array([k[1] for k in known], np.int32), np.ones(len(fresh), np.int32))),
            produced=np.concatenate((np.array([k[2] for k in known], np.int32), np.zeros(len(fresh), np.int32))),
            num_known=len(known),
        )

    def _known(self, budget: int, step: int) -> tuple[list[tuple[int, int, int]], int, int]:
        """Waiting samples of prompts that have been open before: (request, samples, output tokens each of them has had), as
        many as slots and budget are there for; and the slots and tokens that these leave."""
        known: list[tuple[int, int, int]] = []
        free, requests = self._sequences.num_free, self._requests
        for request in filter(self._may_run, self._prompts.suspended):
            if free <= 0 or budget <= 0:
                break
            known.append((request, 1, self._produced(self._prompts.pending_prompt(request))))
            free -= 1
            budget -= int(requests.length[request] - requests.lcp[request]) + known[-1][2]
        for prompt in self._prompts.with_pending():
            if free <= 0 or budget <= 0:
                break
            forks = prompt.can_fork(step)
            if not self._may_run(prompt.request) or (not forks and (prompt.leader >= 0 or prompt.tainted)):
                continue
            if not forks:
                alike = [(1, self._produced(prompt))]
            elif not prompt.requeued:
                alike = [(min(prompt.num_pending, free, budget), 0)]
            else:
                # Each has a length of its own, and as many tokens to compute again.
                lengths = [self._produced(prompt, sample) for sample in islice(prompt.requeued, free)]
                before = accumulate(lengths[:-1], initial=0)
                alike = [(1, length) for length, tokens in zip(lengths, before, strict=True) if tokens < budget]
            known += [(prompt.request, count, produced) for count, produced in alike]
            free -= sum(count for count, _ in alike)
            budget -= sum(count + produced for count, produced in alike)
        return known, free, budget

    def _may_run(self, request: int) -> bool:
        return self.confined is None or request in self.confined

    def _fitting(self, candidates: _Candidates) -> Int32:
        """How many samples of each candidate fit the pool at every future step."""
        size, entries = self._page_size, candidates.request
        request = np.repeat(entries, candidates.counts)
        produced, sample = np.repeat(candidates.produced, candidates.counts), self._sample_numbers(candidates)
        ticket = self._sequences.num_admissions + np.arange(len(request))
        length = self._requests.length[request]
        full, total = (length - 1) // size, -(-length // size)
        closed = np.ones(len(entries), np.bool_)
        closed[: candidates.num_known] = [entry not in self._prompts for entry in entries[: candidates.num_known].tolist()]
        opens = np.repeat(closed, candidates.counts)
        self._asked_from = self._sequences.num_admissions
        self._asked_lengths = self._predict(request, sample, produced, ticket)
        claims = Claims(
            computed=length - 1 + produced,
            shared=np.where(opens, total, full),
            remaining=self._asked_lengths - produced,
            prompt_pages=np.where(opens, total - np.minimum(self._requests.lcp[request] // size, full), 0),
        )
        peak = claims.peak(size)
        self._steps_good_for -= 1
        if self._steps_good_for > 0 and peak <= self._surely_free:
            self._surely_free -= peak
            return candidates.counts
        deviations = 0.0 if self._all_fixed else self._caution.deviations
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
        remaining = self.remaining(order)
        running = Claims(
            # A prompt under way is taken as computed: what its length holds is claimed from the start.
            computed=np.maximum(seq.length[order] - 1, 0),
            shared=seq.shared_pages[order],
            remaining=remaining,
            prompt_pages=np.zeros(len(order), np.int32),
        )
        held_steps = self._prompts.last_steps(seq.request[order], remaining)
        return Forecast(self._page_size, running, self._prompts.held_pages(), held_steps, also)

    def _produced(self, prompt: OpenPrompt, sample: int | None = None) -> int:
        """Output tokens that a sample of this prompt had when it was preempted; of the one admitted next by default."""
        if sample is None and prompt.requeued:
            sample = prompt.requeued[0]
        output = None if sample is None else self.preempted.get((prompt.request, sample))
        return 0 if output is None else len(output.tokens)

    def _sample_numbers(self, candidates: _Candidates) -> Int32:
        """The number of each sample of the candidates."""
        sample = np.zeros(int(candidates.counts.sum()), np.int32)
        stop, taken = 0, Counter[int]()
        for request, count in zip(
            candidates.request[: candidates.num_known].tolist(), candidates.counts.tolist(), strict=False
        ):
            prompt, start, stop = self._prompts.pending_prompt(request), stop, stop + count
            if prompt.requeued:
                sample[start] = prompt.requeued[taken[request]]
                taken[request] += 1
            else:
                sample[start:stop] = prompt.samples[prompt.next_sample : prompt.next_sample + count]
        return sample

    def _so_far(self, slots: Int64) -> Int32:
        """Output tokens of each slot, those that steps in flight are about to sample included."""
        return self._sequences.length[slots] - self._sequences.prompt_length[slots]

    def _predict(self, request: Int32, sample: Int32, generated: Int32, ticket: Int64) -> Int32:
        """Total output tokens that each sample is taken to have, at least one more than it has."""
        params = self._requests.params[request]
        limit = self._max_tokens[params]
        if self._all_fixed:
            return np.maximum(limit, generated + 1)
        expected = self._lengths.predict(request, sample, generated, limit, ticket)
        return np.maximum(np.where(self._fixed_length[params], limit, expected), generated + 1)

    def _admit_known(self, candidates: _Candidates, counts: Int32, budget: int, draft: StepDraft) -> tuple[list[Runs], bool]:
        """Admit samples of prompts that have been open before; and whether all that asked got a sample in."""
        taken: list[Runs] = []
        for i in range(candidates.num_known):
            request, count = int(candidates.request[i]), min(int(counts[i]), budget, self._sequences.num_free)
            if count <= 0:
                return taken, False
            prompt = self._prompts[request] if request in self._prompts else self._prompts.reopen(request)
            if prompt is None:
                return taken, False
            fork = prompt.can_fork(draft.index)
            count = min(count, self._pool.num_free) if fork else 1
            if count == 0:
                return taken, False
            runs = self._fork(prompt, count, budget, draft) if fork else self._lead([prompt], budget, draft)
            budget -= int(runs[1].sum())
            taken.append(runs)
        return taken, True

    def _admit_fresh(self, count: int, budget: int, draft: StepDraft) -> Runs:
        """Open the next prompts and admit the first sample of each."""
        opened = self._prompts.open_next(count)
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

    def _fork(self, prompt: OpenPrompt, count: int, budget: int, draft: StepDraft) -> Runs:
        """Admit samples of a computed prompt: they read its full pages in place, and copy its last, partly filled one."""
        samples = np.array([prompt.take_sample() for _ in range(count)], np.int32)
        requests = np.full(count, prompt.request, np.int32)
        slots = self._sequences.open(requests, samples)
        shared = np.full(count, prompt.full, np.int32)
        draft.set_pages(self._sequences.share_pages(slots, shared, np.tile(prompt.pages[: prompt.full], count)))
        self._fill(slots, requests, np.full(count, prompt.length - 1, np.int32))
        prompt.live += count
        runs = self._start(slots, budget, draft)
        if (prompt.length - 1) % self._page_size:
            tail = np.full(count, prompt.pages[prompt.full], np.int32)
            draft.copy_pages(tail, self._sequences.page_table[slots, prompt.full])
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
        length = self._requests.length[requests]
        params = self._requests.params[requests]
        seq.prompt_length[slots] = seq.length[slots] = length
        seq.params[slots], seq.limit[slots] = params, self._max_tokens[params]
        seq.computed[slots] = seq.cached_tokens[slots] = start
        seq.expected[slots] = self._asked_lengths[seq.admitted[slots] - self._asked_from]
        counts.prompt_tokens += int(length.sum())
        counts.cached_tokens += int(start.sum())
        if not self.preempted:
            return
        for i, slot in enumerate(slots.tolist()):
            output = self.preempted.pop((int(requests[i]), int(seq.sample[slot])), None)
            if output is not None:
                counts.prompt_tokens -= int(length[i])
                counts.cached_tokens -= int(start[i])
                seq.restore(slot, output)
                seq.length[slot] += len(output.tokens)
                counts.recomputed_tokens += int(seq.length[slot] - start[i])
