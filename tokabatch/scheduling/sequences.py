"""The running samples, a struct of arrays: at thousands of sequences a Python loop a step costs more than the device's step.

A sequence lives in a slot. `length` counts its known tokens, prompt and output, those that steps in flight are about to
sample included; `computed` counts positions whose keys and values exist once those steps have run. Whatever lies between is
to be computed: one token in steady decoding, more in prefill or after a preemption. There are no phases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.messages import Completion, Float32, Int32, Int64
from tokabatch.scheduling.pages import PagePool

FIRST_WIDTH = 1024
"""Output tokens that a slot has room for at first."""


@dataclass(slots=True)
class Generated:
    """What a sample has produced; a preempted one continues from here."""

    tokens: Int32
    logprobs: Float32 | None = None
    top_ids: Int32 | None = None
    top_logprobs: Float32 | None = None
    num_cached_tokens: int = 0

    def completion(
        self,
        row_index: int,
        sample_index: int,
        num_prompt_tokens: int,
        reason: int | str | None = None,
        error: tuple[str, str] | None = None,
    ) -> Completion:
        """The finished sample: `reason` is the stop token or string that ended it, `error` a code and a message."""
        return Completion(
            row_index=row_index,
            sample_index=sample_index,
            token_ids=self.tokens,
            finish_reason="length" if reason is None else "stop",
            stop_reason=reason,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            logprobs=self.logprobs,
            top_ids=self.top_ids,
            top_logprobs=self.top_logprobs,
            error_code=None if error is None else error[0],
            error_message=None if error is None else error[1],
        )


class Sequences:
    """Arrays over slots. `order` lists the active slots in plan order. Slots are int64, as NumPy indexes fastest."""

    def __init__(self, num_slots: int, max_pages: int, pool: PagePool, page_size: int, top_logprobs: int) -> None:
        """`top_logprobs` is the most alternatives any sample reports, -1 when none reports logprobs at all."""
        self.num_slots = num_slots
        self._pool = pool
        self._page_size = page_size

        def column() -> Int32:
            return np.zeros(num_slots, np.int32)

        self.request, self.sample = np.full(num_slots, -1, np.int32), column()
        self.prompt_length, self.length, self.computed = column(), column(), column()
        self.generated = column()
        """Output tokens received."""
        self.expected = column()
        """Output tokens that the forecast takes the sample to have in the end."""
        self.limit, self.params = column(), column()
        self.shared_pages, self.num_pages = column(), column()
        """Columns of the page table: the first `shared_pages` belong to the prompt, the rest up to `num_pages` to the slot."""
        self.cached_tokens = column()
        self.epoch, self.admitted = column(), np.zeros(num_slots, np.int64)
        self.on_device = np.zeros(num_slots, np.bool_)
        """The worker holds the slot's last sampled token."""
        self.page_table = np.zeros((num_slots, max_pages), np.int32)
        self.order = np.zeros(0, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self.num_admissions = 0
        # Memory is taken when it is written to; alternatives are kept for few and widened as they come.
        width = 64 if top_logprobs > 0 else min(max_pages * page_size, FIRST_WIDTH)
        self.tokens = np.zeros((num_slots, width), np.int32)
        shape = (num_slots, width if top_logprobs >= 0 else 0)
        self.logprobs = np.zeros(shape, np.float32)
        self.top_ids = np.zeros((*shape, max(top_logprobs, 0)), np.int32)
        self.top_logprobs = np.zeros((*shape, max(top_logprobs, 0)), np.float32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def open(self, requests: Int32, samples: Int32) -> Int64:
        """Claim a slot for each (request, sample), requests ascending; the caller fills the other columns."""
        slots = np.array(self._free[-len(requests) :], np.int64)
        del self._free[-len(requests) :]
        self.request[slots], self.sample[slots] = requests, samples
        self.generated[slots] = 0
        self.on_device[slots] = False
        self.admitted[slots] = self.num_admissions + np.arange(len(slots))
        self.num_admissions += len(slots)
        if not len(self.order) or requests[0] >= self.request[self.order[-1]]:
            self.order = np.concatenate((self.order, slots))
        else:
            place = np.searchsorted(self.request[self.order], requests, side="right")
            self.order = np.insert(self.order, place, slots)
        return slots

    def close(self, slots: Int64) -> None:
        """Return slots and their own pages; results still in flight for them are recognised by the changed epoch."""
        own = self.own_pages(slots)
        if len(own):
            self._pool.free(own)
        self.request[slots] = -1
        self.epoch[slots] += 1
        self.order = self.order[self.request[self.order] >= 0]
        self._free.extend(slots.tolist())

    def restrict(self, num_slots: int) -> None:
        """Use only the first `num_slots` slots from now on; all are free."""
        assert not len(self.order), "slots are in use"
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    def missing_pages(self, slots: Int64, take: Int32) -> Int32:
        """Pages each slot lacks to compute `take` more tokens."""
        target = -(-(self.computed[slots] + take) // self._page_size)
        return np.maximum(target - self.num_pages[slots], 0)

    def add_pages(self, slots: Int64, counts: Int32) -> tuple[Int64, Int32, Int32]:
        """Append `counts[i]` fresh pages to each slot's table; returns the changed cells: slots, columns, pages."""
        pages = self._pool.allocate(int(counts.sum()))
        owner = np.repeat(slots, counts)
        column = self.num_pages[owner] + np.arange(len(owner), dtype=np.int32)
        column -= np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
        self.page_table[owner, column] = pages
        self.num_pages[slots] += counts
        return owner, column, pages

    def share_pages(self, slots: Int64, counts: Int32, pages: Int32) -> tuple[Int64, Int32, Int32]:
        """Point the first `counts[i]` columns of each slot at its prompt's pages, given slot after slot; the changed cells."""
        owner = np.repeat(slots, counts)
        column = np.arange(len(owner), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
        self.page_table[owner, column] = pages
        self.shared_pages[slots] = self.num_pages[slots] = counts
        return owner, column, pages

    def own_pages(self, slots: Int64) -> Int32:
        """Pages held by these slots themselves, prompts' pages excluded."""
        counts = self.num_pages[slots] - self.shared_pages[slots]
        first = np.cumsum(counts) - counts
        column = np.arange(int(counts.sum())) - np.repeat(first - self.shared_pages[slots], counts)
        return self.page_table[np.repeat(slots, counts), column]

    def append(self, slots: Int64, tokens: Int32) -> None:
        """Store one received token a slot."""
        at = self.generated[slots]
        if len(at) and int(at.max()) >= self.tokens.shape[1]:
            self._widen()
        # One index into the flat table: two take twice as long.
        self.tokens.reshape(-1)[slots * self.tokens.shape[1] + at] = tokens
        self.generated[slots] = at + 1

    def append_logprobs(self, slots: Int64, logprob: Float32, top_ids: Int32, top_logprobs: Float32) -> None:
        """Store the log-probabilities of the tokens just appended."""
        at = self.generated[slots] - 1
        self.logprobs[slots, at] = logprob
        width = top_ids.shape[1]
        self.top_ids[slots, at, :width] = top_ids
        self.top_logprobs[slots, at, :width] = top_logprobs

    def output(self, slot: int, alternatives: int) -> Generated:
        """Copies of what a slot has produced; `alternatives` as in `SlotInit.logprobs`."""
        count = int(self.generated[slot])
        wants = alternatives >= 0
        return Generated(
            tokens=self.tokens[slot, :count].copy(),
            logprobs=self.logprobs[slot, :count].copy() if wants else None,
            top_ids=self.top_ids[slot, :count, :alternatives].copy() if alternatives > 0 else None,
            top_logprobs=self.top_logprobs[slot, :count, :alternatives].copy() if alternatives > 0 else None,
            num_cached_tokens=int(self.cached_tokens[slot]),
        )

    def restore(self, slot: int, output: Generated) -> None:
        """Put back what a preempted sample had produced."""
        count = len(output.tokens)
        while count > self.tokens.shape[1]:
            self._widen()
        self.tokens[slot, :count] = output.tokens
        self.generated[slot] = count
        self.cached_tokens[slot] = output.num_cached_tokens
        if output.logprobs is not None:
            self.logprobs[slot, :count] = output.logprobs
        if output.top_ids is not None and output.top_logprobs is not None:
            self.top_ids[slot, :count, : output.top_ids.shape[1]] = output.top_ids
            self.top_logprobs[slot, :count, : output.top_ids.shape[1]] = output.top_logprobs

    def _widen(self) -> None:
        def doubled(array: np.ndarray) -> np.ndarray:
            return np.concatenate((array, np.zeros_like(array)), axis=1)

        self.tokens = doubled(self.tokens)
        self.logprobs, self.top_ids, self.top_logprobs = map(doubled, (self.logprobs, self.top_ids, self.top_logprobs))
