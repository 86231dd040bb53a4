"""How long every sample is taken to be: as long as its sampling parameters say where they say it, else what the length model
learns, or another `LengthPredictor` in its place says.

A sample whose length its sampling parameters give (`ignore_eos` and nothing else that ends it) is never predicted.
"""

from __future__ import annotations

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.slots import Slots
from tokabatch.scheduling.lengths.predictor import Caution, LengthModel, LengthPredictor
from tokabatch.scheduling.work import Work

LEARNED_SAMPLES = 64
"""A prompt's own lengths are learned where it has at least so many samples: of fewer there is little to learn, and the
more prompts the longer a renewal takes."""


class LengthEstimates:
    """Of the running samples, by slot, and of those that wait."""

    def __init__(self, work: Work, slots: Slots, counts: SchedulerCounts, lengths: LengthPredictor | None) -> None:
        """`lengths` replaces what is learned."""
        self._work = work
        self._slots = slots
        self._counts = counts
        self._replaced = lengths
        self._caution = Caution()
        self._longest = 0
        self._given = np.zeros(0, np.bool_)
        """Of each kind of sampling parameters, whether it gives the length."""
        self._expected = np.zeros(slots.num_slots, np.int32)
        """Output tokens that the sample in each slot is taken to have in the end."""
        self.extend()

    def extend(self) -> None:
        """Take in prompts that have been added. Where one may be longer than any before, lengths are learned again."""
        work, longest = self._work, int(self._work.max_tokens.max(initial=1))
        fresh = [params.has_given_length for params in work.sampling[len(self._given) :]]
        self._given = np.append(self._given, np.array(fresh, np.bool_))
        self._share = np.bincount(work.params, weights=work.num_samples, minlength=len(work.sampling))
        """Samples to draw with each kind of sampling parameters."""
        self._all_given = bool(self._given.all()) and self._replaced is None
        grouped = work.num_samples >= LEARNED_SAMPLES
        if longest > self._longest:
            self._longest, self._model = longest, LengthModel(longest, grouped)
        else:
            self._model.extend(grouped)
        self._lengths: LengthPredictor = self._replaced or self._model

    @property
    def deviations(self) -> float:
        """Standard deviations of page use to plan for above its expectation."""
        return 0.0 if self._all_given else self._caution.deviations

    def refresh(self) -> bool:
        """Once a step: renew what has become out of date. True where all running samples' lengths are new."""
        if self._all_given:
            return False
        seq, counts = self._slots, self._counts
        order = seq.order
        self._caution.update(counts.output_tokens + counts.prefilled_tokens, counts.given_up_tokens)
        renewed = self._lengths.refresh(seq.request[order], self._generated(order))
        due = order if renewed else order[(self._expected <= seq.length - seq.prompt_length)[order]]
        if len(due):
            self._expected[due] = self.predict(seq.request[due], seq.sample[due], self._generated(due), seq.admitted[due])
        return renewed

    def begin(self, slots: Int64, expected: Int32) -> None:
        """Samples have just been admitted to these slots, and are taken to have so many output tokens in the end."""
        self._expected[slots] = expected

    def predict(self, request: Int32, sample: Int32, generated: Int32, ticket: Int64) -> Int32:
        """Total output tokens that each sample is taken to have, at least one more than it has; see `LengthPredictor`."""
        params = self._work.params[request]
        limit = self._work.max_tokens[params]
        if self._all_given:
            return np.maximum(limit, generated + 1)
        expected = self._lengths.predict(request, sample, generated, limit, ticket)
        return np.maximum(np.where(self._given[params], limit, expected), generated + 1)

    def remaining(self, slots: Int64) -> Int32:
        """Output tokens that each sample, by the length it is taken to have, still has to come; at least 1."""
        return np.maximum(self._expected[slots] - self._generated(slots), 1)

    def typical_remaining(self, slots: Int64) -> Int32:
        """Output tokens that such samples typically still have to come, at least 1."""
        seq = self._slots
        known, limit = self._generated(slots), seq.limit[slots]
        typical = self._expected[slots] if self._replaced is not None else self._model.typical(seq.request[slots], known, limit)
        return np.maximum(np.where(self._given[seq.params[slots]], limit, typical) - known, 1)

    def tokens_left(self, waiting: int) -> int:
        """Output tokens still to come: of the running samples, and of `waiting` more at the workload's mean."""
        seq, model = self._slots, self._model
        order = seq.order
        limit, known = seq.limit[order], self._generated(order)
        expected = model.predict(seq.request[order], seq.sample[order], known, limit, seq.admitted[order])
        total = int((np.where(self._given[seq.params[order]], limit, expected) - seq.generated[order]).sum())
        if not waiting:
            return total
        means = np.where(self._given, self._work.max_tokens, model.mean_lengths(self._work.max_tokens))
        return total + round(waiting * float(np.average(means, weights=self._share)))

    def observe(self, slots: Int64, stopped: Bool) -> None:
        """These slots' samples are finished; `stopped` where the model ended them, not the limit."""
        if not self._all_given:
            open_ended = ~self._given[self._slots.params[slots]]
            slots, stopped = slots[open_ended], stopped[open_ended]
            self._lengths.observe(self._slots.request[slots], self._slots.generated[slots], stopped)

    def learn(self, length: Int32, stopped: Bool) -> None:
        """Samples of other prompts have ended elsewhere; see `observe`."""
        self._model.learn(length, stopped)

    def forget(self, requests: list[int]) -> None:
        """All samples of these prompts are finished."""
        if not self._all_given and self._replaced is None:
            self._model.forget(requests)

    def before_forgetting(self) -> None:
        """Count what has ended of prompts that are about to be forgotten."""
        self._model.settle()

    def forget_first(self, count: int) -> None:
        """See `Work.forget`."""
        self._model.forget_first(count)
        self._given = self._given[:0]
        self.extend()

    def _generated(self, slots: Int64) -> Int32:
        """Output tokens of each slot, those that steps in flight are about to sample included."""
        return self._slots.length[slots] - self._slots.prompt_length[slots]
