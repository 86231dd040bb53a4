"""How waiting samples enter a step: finds candidates, has the policy say how many to admit, and opens their slots.

How many are admitted is decided in `forecast_policy`; here the count is cut to the slots, tokens and pages that are free. A
later candidate never overtakes an earlier one that does not fit, so no sample starves.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, groupby, islice

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.scheduling.kv.manager import NO_RUNS, KVCacheManager, Runs
from tokabatch.scheduling.kv.prefix_tree import PromptPages
from tokabatch.scheduling.lengths.length_estimates import LengthEstimates
from tokabatch.scheduling.policy.guarded_policy import GuardedPolicy
from tokabatch.scheduling.policy.policy import Candidates
from tokabatch.scheduling.work import Work

MAX_FRESH = 256
"""The most prompts that begin in one step."""

_Known = tuple[PromptPages, list[int], int]
"""A prompt that has been open before, the numbers of the samples to admit, and the output tokens that each already has."""


class Admission:
    """Find candidates, and open slots for as many of them as the policy admits."""

    def __init__(self, work: Work, kv: KVCacheManager, lengths: LengthEstimates, policy: GuardedPolicy) -> None:
        self._work = work
        self._kv = kv
        self._lengths = lengths
        self._policy = policy

    def admit(self, budget: int, step: int) -> Runs:
        """Open slots for samples that join step number `step`, with `budget` tokens left. Return what they compute in it."""
        if budget <= 0 or not self._kv.slots.num_free:
            return NO_RUNS
        candidates = self._candidates(budget, step)
        if candidates is None:
            return NO_RUNS
        counts, first_ticket = self._policy.admit(candidates), self._kv.slots.num_admissions
        fresh = counts[candidates.num_known :]
        taken = self._admit(candidates, counts, len(fresh) if fresh.all() else int(np.argmin(fresh > 0)), budget, step)
        opened, runs = self._kv.opened, Runs.joined(taken)
        self._lengths.begin(opened, candidates.lengths[self._kv.slots.admitted[opened] - first_ticket])
        case, first = self._policy.case, int(candidates.request[0])
        if case.alone and counts[0] and not len(runs.slots) and self._kv.suspend_idle(keep=first):
            if candidates.num_known:
                # Only the first may enter: a prompt just suspended would come before it and take the pages that were freed.
                self._policy.case = replace(case, confined_to=frozenset((first,)))
            return self.admit(budget, step)
        return runs

    def _candidates(self, budget: int, step: int) -> Candidates | None:
        """Return as many candidates as there are slots and tokens for, or None if there are none: first prompts that have been
        open before, in the policy's order, then prompts never begun."""
        work, tree, free = self._work, self._kv.tree, self._kv.slots.num_free
        known: list[_Known] = []
        for prompt in self._policy.order([*tree.suspended, *tree.with_pending()]):
            if free <= 0 or budget <= 0:
                break
            asking, tokens = self._asking(prompt, free, budget, step)
            known += asking
            free -= sum(len(samples) for _, samples, _ in asking)
            budget -= tokens
        fresh = work.upcoming(min(max(free, 0), MAX_FRESH) if budget > 0 else 0)
        cost = np.cumsum(work.length[fresh] - work.lcp[fresh])
        fresh = fresh[: int(np.searchsorted(cost, budget)) + 1]
        if not known and not len(fresh):
            return None
        numbers = [sample for _, samples, _ in known for sample in samples]
        request = np.concatenate((np.array([prompt.request for prompt, _, _ in known], np.int32), fresh))
        counts = np.array([*(len(samples) for _, samples, _ in known), *[1] * len(fresh)], np.int32)
        produced = np.array([*(produced for _, _, produced in known), *[0] * len(fresh)], np.int32)
        samples = np.array([*numbers, *[0] * len(fresh)], np.int32)
        tickets = self._kv.slots.num_admissions + np.arange(len(samples))
        lengths = self._lengths.predict(np.repeat(request, counts), samples, np.repeat(produced, counts), tickets)
        return Candidates(len(known), request, counts, produced, samples, lengths)

    def _asking(self, prompt: PromptPages, free: int, budget: int, step: int) -> tuple[list[_Known], int]:
        """Return the samples that a known prompt can fill `free` slots and `budget` tokens with, and the tokens they take."""
        present = prompt.request in self._kv.tree
        if not present or not prompt.can_fork(step):
            if present and (prompt.leader >= 0 or prompt.has_nan):
                return [], 0
            # One sample, which computes the prompt.
            sample = next(iter(prompt.preempted), None)
            produced = 0 if sample is None else len(prompt.preempted[sample].tokens)
            number = int(prompt.samples[prompt.next_sample]) if sample is None else sample
            tokens = 1 if present else int(self._work.length[prompt.request] - self._work.lcp[prompt.request])
            return [(prompt, [number], produced)], tokens + produced
        if not prompt.preempted:
            count = min(prompt.num_pending, free, budget)
            return [(prompt, prompt.samples[prompt.next_sample : prompt.next_sample + count].tolist(), 0)], count
        # Preempted samples differ in how many output tokens they have, all of which are computed again.
        preempted = [(sample, len(output.tokens)) for sample, output in islice(prompt.preempted.items(), free)]
        before = accumulate([produced for _, produced in preempted[:-1]], initial=0)
        asking = [(prompt, [sample], size) for (sample, size), tokens in zip(preempted, before, strict=True) if tokens < budget]
        return asking, sum(1 + produced for _, _, produced in asking)

    def _admit(self, candidates: Candidates, counts: Int32, num_fresh: int, budget: int, step: int) -> list[Runs]:
        """Admit samples of prompts that have been open before. If each of these had a sample admitted, begin `num_fresh` new
        prompts. Return the runs of the opened slots, in parts."""
        kv, tree, taken = self._kv, self._kv.tree, list[Runs]()
        requests = candidates.request[: candidates.num_known].tolist()
        forks = [request in tree and tree[request].can_fork(step) for request in requests]
        for forking, group in groupby(range(len(requests)), forks.__getitem__):
            places = list(group)
            if forking:
                asked, produced = counts[places], candidates.produced[places]
                # A sample takes a slot, a page, and a token besides those that it computes again.
                room = min(kv.slots.num_free, kv.num_free_pages) - (np.cumsum(asked) - asked)
                tokens = budget - np.cumsum(asked * (produced + 1)) + asked * (produced + 1)
                enter = np.clip(np.minimum(room, tokens), 0, asked)
                count = len(enter) if enter.all() else int(np.argmin(enter > 0))
                # New prompts are opened together with the last forks: one call costs as much for few slots as for many.
                last = places[-1] == len(requests) - 1
                num_fresh = num_fresh if count == len(enter) else 0
                if count:
                    taken.append(
                        kv.fork([requests[i] for i in places[:count]], enter[:count], num_fresh if last else 0, budget)
                    )
                    budget -= int(taken[-1].tokens.sum())
                if last or count < len(enter):
                    return taken
                continue
            for i in places:
                runs = kv.open(requests[i], budget) if counts[i] > 0 and budget > 0 and kv.slots.num_free else None
                if runs is None:
                    return taken
                taken.append(runs)
                budget -= int(runs.tokens.sum())
        if num_fresh:
            taken.append(kv.fork([], counts[:0], num_fresh, budget))
        return taken
