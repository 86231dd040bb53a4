"""The running samples as a struct of arrays: with thousands of samples, a Python loop each step would take longer than the
device.

Each running sample has a slot. `length` counts its tokens, prompt and output, including those that steps in flight will sample;
`computed` counts the positions whose keys and values exist once those steps have run. The positions between are to be computed:
one token in steady decoding, more in prefill or after a preemption. Prefill and decoding are not separate phases.
"""

from __future__ import annotations

from dataclasses import astuple, fields

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import SampleCounts
from tokabatch.scheduling.generated import Generated, Outputs


class Slots:
    """Arrays over slots. `order` lists the active slots in plan order. Slot numbers are int64, with which NumPy indexes
    fastest."""

    def __init__(self, num_slots: int, max_pages: int, top_logprobs: int) -> None:
        """`top_logprobs` is the most alternatives any sample reports, -1 when none reports logprobs at all."""
        self.num_slots = num_slots

        def column() -> Int32:
            return np.zeros(num_slots, np.int32)

        self.request, self.sample = np.full(num_slots, -1, np.int32), column()
        self.prompt_length, self.length, self.computed = column(), column(), column()
        self.limit, self.params = column(), column()
        self.shared_pages, self.num_pages = column(), column()
        """Columns of the page table: the first `shared_pages` belong to the prompt, the rest up to `num_pages` to the slot."""
        self.sample_counts: SampleCounts[Int32] = SampleCounts(*(column() for _ in fields(SampleCounts)))
        self._counted = [getattr(self.sample_counts, field.name) for field in fields(SampleCounts)]
        """The columns of `sample_counts`."""
        self.epoch, self.admitted = column(), np.zeros(num_slots, np.int64)
        self.on_device = np.zeros(num_slots, np.bool_)
        """Whether the worker holds the slot's last sampled token."""
        self.page_table = np.zeros((num_slots, max_pages), np.int32)
        self.order = np.zeros(0, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self.num_admissions = 0
        self.outputs = Outputs(num_slots, top_logprobs)

    @property
    def generated(self) -> Int32:
        """The number of output tokens received of each slot, shape [slots]."""
        return self.outputs.count

    @property
    def num_free(self) -> int:
        return len(self._free)

    def open(self, requests: Int32, samples: Int32) -> Int64:
        """Open a slot for each (request, sample), in any order, and return the slots; the caller fills the other columns."""
        slots = np.array(self._free[-len(requests) :], np.int64)
        del self._free[-len(requests) :]
        self.request[slots], self.sample[slots] = requests, samples
        self.on_device[slots] = False
        for column in self._counted:
            column[slots] = 0
        self.admitted[slots] = self.num_admissions + np.arange(len(slots))
        self.num_admissions += len(slots)
        order = np.concatenate((self.order, slots))
        self.order = order[np.argsort(self.request[order], kind="stable")]
        return slots

    def close(self, slots: Int64) -> None:
        """Free slots and increment their epochs, by which results still in flight for them are recognised."""
        self.outputs.close(slots)
        self.request[slots] = -1
        self.epoch[slots] += 1
        self.order = self.order[self.request[self.order] >= 0]
        self._free.extend(slots.tolist())

    def restrict(self, num_slots: int) -> None:
        """Use only the first `num_slots` slots from now on; all slots must be free."""
        assert not len(self.order), "slots are in use"
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    def runnable(self) -> tuple[Int64, Int64]:
        """Return the slots with tokens to compute: those whose last token the worker holds, in plan order, and those whose
        tokens come from the host, oldest first."""
        pending = self.order[(self.length > self.computed)[self.order]]
        on_device = self.on_device[pending]
        if on_device.all():
            return pending, pending[:0]
        prefilling = pending[~on_device]
        return pending[on_device], prefilling[np.argsort(self.admitted[prefilling], kind="stable")]

    def prefill_chunks(self, slots: Int64, ends: Int32, budget: int) -> Int32:
        """Return how many tokens up to position `ends[i]` each of these slots computes in a step with `budget` tokens for all
        of them, granted to the first slots first; shape as `ends`."""
        pending = ends - self.computed[slots]
        return np.clip(budget - (np.cumsum(pending) - pending), 0, pending).astype(np.int32)

    def own_pages(self, slots: Int64) -> Int32:
        """Return the pages held by these slots themselves, excluding their prompts' pages."""
        counts = self.num_pages[slots] - self.shared_pages[slots]
        first = np.cumsum(counts) - counts
        column = np.arange(int(counts.sum())) - np.repeat(first - self.shared_pages[slots], counts)
        return self.page_table[np.repeat(slots, counts), column]

    def read(self, slots: Int64) -> list[Generated]:
        """Return copies of the outputs and counters of these slots."""
        read = self.outputs.read(slots)
        for output, *numbers in zip(read, *(column[slots].tolist() for column in self._counted), strict=True):
            output.counts = SampleCounts(*numbers)
        return read

    def restore(self, slot: int, output: Generated) -> None:
        """Restore the output and counters of a preempted sample."""
        self.outputs.restore(slot, output)
        for column, number in zip(self._counted, astuple(output.counts), strict=True):
            column[slot] = number
