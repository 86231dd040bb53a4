"""The estimated length of each sample: given by its sampling parameters, or else predicted by the length model.

Another `LengthPredictor` may replace the model. A sample whose length its sampling parameters give (`ignore_eos` and no other
stop condition) is never predicted.
"""

from __future__ import annotations

import math

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.slots import Slots
from tokabatch.scheduling.lengths.predictor import Caution, LengthModel, LengthPredictor
from tokabatch.scheduling.work import Work

HORIZON = 3 / 4
"""How far `headway` looks ahead, in mean lengths of samples."""
LEARNED_SAMPLES = 64
"""The fewest samples of a prompt whose own length distribution is estimated: fewer carry little information, and each further
prompt makes an update slower."""


class LengthEstimates:
    """Length estimates of the running samples, by slot, and of waiting ones."""

    def __init__(self, work: Work, slots: Slots, counts: SchedulerCounts, lengths: LengthPredictor | None) -> None:
        """`lengths` replaces the length model."""
        self._work = work
        self._slots = slots
        self._counts = counts
        self._replaced = lengths
        self._caution = Caution()
        self._longest = 0
        self._given = np.zeros(0, np.bool_)
        """Whether each entry of the sampling parameters gives the length."""
        self._expected = np.zeros(slots.num_slots, np.int32)
        """Predicted total output tokens of the sample in each slot, shape [slots]."""
        self.extend()

    def extend(self) -> None:
        """Take added prompts into account. If their samples may be longer than any before, start a new length model."""
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
        self._horizon: tuple[int, float] | None = None
        """The horizon in tokens, and how many of so many a sample is expected to have; None if outdated."""

    @property
    def deviations(self) -> float:
        """Standard deviations of page use to plan for above its expectation."""
        return 0.0 if self._all_given else self._caution.deviations

    def refresh(self) -> bool:
        """Renew outdated estimates; call this once a step. Return whether all running samples were estimated anew."""
        if self._all_given:
            return False
        seq, counts = self._slots, self._counts
        order = seq.order
        self._caution.update(counts.output_tokens + counts.prefilled_tokens, counts.given_up_tokens)
        renewed = self._lengths.refresh(seq.request[order], self._generated(order))
        self._horizon = None if renewed else self._horizon
        due = order if renewed else order[(self._expected <= seq.length - seq.prompt_length)[order]]
        if len(due):
            self._expected[due] = self.predict(seq.request[due], seq.sample[due], self._generated(due), seq.admitted[due])
        return renewed

    def begin(self, slots: Int64, expected: Int32) -> None:
        """Set the predicted total output tokens of samples that have just been admitted to these slots."""
        self._expected[slots] = expected

    def predict(self, request: Int32, sample: Int32, generated: Int32, ticket: Int64) -> Int32:
        """Return the predicted total output tokens of each sample, at least one more than it has; see `LengthPredictor`."""
        params = self._work.params[request]
        limit = self._work.max_tokens[params]
        if self._all_given:
            return np.maximum(limit, generated + 1)
        expected = self._lengths.predict(request, sample, generated, limit, ticket)
        return np.maximum(np.where(self._given[params], limit, expected), generated + 1)

    def remaining(self, slots: Int64) -> Int32:
        """Return the predicted remaining output tokens of each sample, at least 1."""
        return np.maximum(self._expected[slots] - self._generated(slots), 1)

    def typical_remaining(self, slots: Int64) -> Int32:
        """Return the typical remaining output tokens of samples of the same prompt and age, at least 1."""
        seq = self._slots
        known, limit = self._generated(slots), seq.limit[slots]
        typical = self._expected[slots] if self._replaced is not None else self._model.typical(seq.request[slots], known, limit)
        return np.maximum(np.where(self._given[seq.params[slots]], limit, typical) - known, 1)

    def tokens_left(self, waiting: int) -> int:
        """Return the expected output tokens still to come: of the running samples, and of `waiting` more at the workload's
        mean."""
        seq, model = self._slots, self._model
        order = seq.order
        limit, known = seq.limit[order], self._generated(order)
        expected = model.predict(seq.request[order], seq.sample[order], known, limit, seq.admitted[order])
        total = int((np.where(self._given[seq.params[order]], limit, expected) - seq.generated[order]).sum())
        return total + round(waiting * self._mean_within(self._longest)) if waiting else total

    @property
    def headway(self) -> float:
        """See `Scheduler`. Only the next tokens up to `HORIZON` count: a slot that does not come free within that time is of no
        use to a sample that waits for it, however long it stays taken. 0 for given texts, all of which is computed at once."""
        seq, order = self._slots, self._slots.order
        if not len(order) or self._work.continuations is not None:
            return 0.0
        if self._horizon is None:
            within = math.ceil(HORIZON * self._mean_within(self._longest))
            self._horizon = within, self._mean_within(within)
        within, of_fresh = self._horizon
        generated = self._generated(order)
        most = np.minimum(seq.limit[order] - generated, within)
        left = most
        if not self._all_given:
            left = np.where(self._given[seq.params[order]], most, self._model.expected(generated, most))
        return len(order) - float(left.sum()) / of_fresh

    def _mean_within(self, most: int) -> float:
        """Return the expected output tokens of a sample that has not begun, at most `most`: the workload's mean."""
        limit = np.minimum(self._work.max_tokens, most)
        expected = np.where(self._given, limit, self._model.expected(np.zeros_like(limit), limit))
        return float(np.average(expected, weights=self._share))

    def observe(self, slots: Int64, stopped: Bool) -> None:
        """Learn from finished samples that are still in these slots; `stopped` is True if the model ended them, not the
        limit."""
        if not self._all_given:
            open_ended = ~self._given[self._slots.params[slots]]
            slots, stopped = slots[open_ended], stopped[open_ended]
            self._lengths.observe(self._slots.request[slots], self._slots.generated[slots], stopped)

    def learn(self, length: Int32, stopped: Bool) -> None:
        """Learn from samples of other prompts that ended on another replica; see `observe`."""
        self._model.learn(length, stopped)

    def forget(self, requests: list[int]) -> None:
        """Forget these prompts, of which all samples are finished."""
        if not self._all_given and self._replaced is None:
            self._model.forget(requests)

    def before_forgetting(self) -> None:
        """Count the finished samples of prompts that are about to be forgotten."""
        self._model.settle()

    def forget_first(self, count: int) -> None:
        """See `Work.forget`."""
        self._model.forget_first(count)
        self._given = self._given[:0]
        self.extend()

    def _generated(self, slots: Int64) -> Int32:
        """Return the output tokens of each slot, including those that steps in flight will sample."""
        return self._slots.length[slots] - self._slots.prompt_length[slots]
