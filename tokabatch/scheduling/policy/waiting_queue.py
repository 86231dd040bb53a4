"""Who asks to join the next step, in plan order: prompts whose pages had to be given up, then open prompts with samples left,
then prompts never opened. As many as slots and budget are there for; which of them fit is decided elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np

from tokabatch.messages import Int32
from tokabatch.scheduling.kv.prefix_tree import OpenPrompt, OpenPrompts
from tokabatch.scheduling.kv.slots import Sequences
from tokabatch.scheduling.outputs import Generated
from tokabatch.scheduling.work import Work

MAX_FRESH = 256
"""Prompts opened in one step at most."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Arrays over candidates: `counts[i]` samples of `request[i]`, each with `produced[i]` output tokens from before it was
    preempted; the first `num_known` are of prompts that have been open before."""

    request: Int32
    counts: Int32
    produced: Int32
    num_known: int


class Waiting:
    """The samples that wait. Reads the scheduler's books and keeps what preempted samples had produced."""

    def __init__(self, work: Work, prompts: OpenPrompts, sequences: Sequences) -> None:
        self._work = work
        self._prompts = prompts
        self._sequences = sequences
        self.preempted: dict[tuple[int, int], Generated] = {}
        """Output of preempted samples by (request, sample)."""
        self.confined: frozenset[int] | None = None
        """The only requests that may come in; None is all."""

    def candidates(self, budget: int, step: int) -> Candidates:
        """For a step of `budget` more tokens."""
        known, free, budget = self._known(budget, step)
        fresh = self._work.upcoming(min(max(free, 0), MAX_FRESH))
        cost = np.cumsum(self._work.length[fresh] - self._work.lcp[fresh])
        none = budget <= 0 or self.confined is not None
        fresh = fresh[:0] if none else fresh[: int(np.searchsorted(cost, budget)) + 1]
        return Candidates(
            request=np.concatenate((np.array([k[0] for k in known], np.int32), fresh)),
            counts=np.concatenate((np.array([k[1] for k in known], np.int32), np.ones(len(fresh), np.int32))),
            produced=np.concatenate((np.array([k[2] for k in known], np.int32), np.zeros(len(fresh), np.int32))),
            num_known=len(known),
        )

    def sample_numbers(self, candidates: Candidates) -> Int32:
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

    def _known(self, budget: int, step: int) -> tuple[list[tuple[int, int, int]], int, int]:
        """Waiting samples of prompts that have been open before: (request, samples, output tokens each of them has had); and
        the slots and tokens that these leave."""
        known: list[tuple[int, int, int]] = []
        free, work = self._sequences.num_free, self._work
        for request in filter(self._may_run, self._prompts.suspended):
            if free <= 0 or budget <= 0:
                break
            known.append((request, 1, self._produced(self._prompts.pending_prompt(request))))
            free -= 1
            budget -= int(work.length[request] - work.lcp[request]) + known[-1][2]
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

    def _produced(self, prompt: OpenPrompt, sample: int | None = None) -> int:
        """Output tokens that a sample of this prompt had when it was preempted; of the one admitted next by default."""
        if sample is None and prompt.requeued:
            sample = prompt.requeued[0]
        output = None if sample is None else self.preempted.get((prompt.request, sample))
        return 0 if output is None else len(output.tokens)
