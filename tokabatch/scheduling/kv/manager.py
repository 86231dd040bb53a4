"""The KV cache manager: the only interface through which whatever holds pages is opened, forked, grown and closed.

It owns the page pool (references), the prefix tree (prompts and the pages they share) and the slots (running samples and their
page tables). Other modules read these; only the methods here change them. The changes that the next step sends to the worker
(new slots, page-table cells, pages to copy and to clear) are collected until `take_changes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import StepBatch
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.generated import Generated, unscored
from tokabatch.scheduling.kv.page_pool import PagePool
from tokabatch.scheduling.kv.prefix_tree import PrefixTree, PromptPages
from tokabatch.scheduling.kv.slots import Slots
from tokabatch.scheduling.work import Work

_NO_SLOTS, _NONE = np.zeros(0, np.int64), np.zeros(0, np.int32)


class Runs(NamedTuple):
    """The slots that compute in a step, R of them, and how many tokens each."""

    slots: Int64
    """Shape [R]."""
    tokens: Int32
    """The number of tokens of each, shape [R]."""

    @staticmethod
    def joined(parts: Sequence[Runs]) -> Runs:
        """Return the concatenation of all parts."""
        slots, tokens = zip(NO_RUNS, *parts, strict=True)
        return Runs(np.concatenate(slots), np.concatenate(tokens))


NO_RUNS = Runs(_NO_SLOTS, _NONE)


class Cells(NamedTuple):
    """Changed cells of the page table, shape [C] each."""

    slot: Int64
    column: Int32
    page: Int32


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """The changes since the last step: S opened slots, C cells of the page table, P copied pages."""

    opened: Int64
    """Shape [S]."""
    cells: Cells
    """Shape [C] each; no cell occurs twice."""
    copy_src: Int32
    """Pages to copy, shape [P]; `copy_dst` holds the destinations."""
    copy_dst: Int32
    clear_pages: Int32


class KVCacheManager:
    """The pages, page tables, prompts and slots of one cache."""

    def __init__(
        self, work: Work, counts: SchedulerCounts, num_pages: int, page_size: int, num_slots: int, max_pages_per_slot: int
    ) -> None:
        self._work = work
        self._counts = counts
        self.page_size = page_size
        self._max_pages_per_slot = max_pages_per_slot
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(work, self.pool, page_size)
        most = int(work.logprobs.max(initial=-1))
        self.slots = Slots(num_slots, max_pages_per_slot, most)
        self._opened: list[Int64] = []
        self._cells: list[Cells] = []
        self._copies: list[tuple[Int32, Int32]] = []

    @property
    def num_free_pages(self) -> int:
        """The number of pages without a reference."""
        return self.pool.num_free

    @property
    def opened(self) -> Int64:
        """Slots opened since the last `take_changes`."""
        return np.concatenate(self._opened) if self._opened else _NO_SLOTS

    def open(self, request: int, budget: int) -> Runs | None:
        """Admit one sample of a prompt that has been open before and is not computed, reopening the prompt if it has no pages.
        Return what the sample computes, or None while another prompt must first compute what the two share, or while there are
        too few pages."""
        prompt = self.tree[request] if request in self.tree else self.tree.reopen(request)
        return None if prompt is None else self._admit([], _NONE, [prompt], budget)

    def fork(self, requests: list[int], counts: Int32, num_fresh: int, budget: int) -> Runs:
        """Admit `counts[i]` samples of each computed prompt, which read its full pages in place and copy its last one if that
        is partly filled. Then begin up to `num_fresh` prompts that have never been open, in plan order, with one sample each,
        which computes the prompt. All together compute at most `budget` tokens; fewer prompts begin if pages or tokens run out.
        Return what the slots compute."""
        forks, num_forks = [self.tree[request] for request in requests], int(counts.sum())
        for prompt, count in zip(forks, counts.tolist(), strict=True):
            prompt.live += count
        if num_forks and (self._work.has_texts or any(prompt.preempted for prompt in forks)):
            # These differ in the tokens and pages that they take; all others take one of both.
            runs = self._admit(forks, counts, [], budget)
            return Runs.joined((runs, self.fork([], _NONE, num_fresh, budget - int(runs.tokens.sum()))))
        num_fresh, budget_left = min(num_fresh, self.slots.num_free - num_forks), budget - num_forks
        fresh = list[PromptPages]()
        if num_fresh > 0 and budget_left > 0:
            fresh = self.tree.open_next(num_fresh, budget_left, self.pool.num_free - num_forks)
        return self._admit(forks, counts, fresh, budget) if num_forks or fresh else NO_RUNS

    def at_page_end(self, slots: Int64) -> Int64:
        """Return those of these decoding slots whose next token requires a new page."""
        return slots[(self.slots.computed >= self.slots.num_pages * self.page_size)[slots]]

    def missing_pages(self, slots: Int64, tokens: Int32) -> Int32:
        """Return how many further pages each slot requires to compute so many more tokens, shape as `slots`."""
        target = -(-(self.slots.computed[slots] + tokens) // self.page_size)
        return np.maximum(target - self.slots.num_pages[slots], 0)

    def grow(self, slots: Int64, tokens: Int32) -> None:
        """Give each slot the pages that it requires to compute so many more tokens. The caller has checked that enough are
        free."""
        if not len(slots):
            return
        counts = self.missing_pages(slots, tokens)
        pages = self.pool.allocate(int(counts.sum()))
        owner = np.repeat(slots, counts)
        column = self.slots.num_pages[owner] + np.arange(len(owner), dtype=np.int32)
        column -= np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
        self.slots.page_table[owner, column] = pages
        self.slots.num_pages[slots] += counts
        self._cells.append(Cells(owner, column, pages))

    def advance(self, step: StepBatch) -> Int64:
        """Advance the slots past a step, as if no sample ended in it. Return the slots that sample."""
        slots, run_slot = self.slots, step.run_slot.astype(np.int64)
        slots.computed[run_slot] = step.run_start + step.run_length
        prefilled = run_slot[: step.num_prefill_runs]
        for slot, request in zip(prefilled.tolist(), slots.request[prefilled].tolist(), strict=True):
            self.tree[request].advance(slot, int(slots.computed[slot]), step.index)
        sampled = run_slot[step.run_samples]
        slots.on_device[sampled] = True
        slots.length[sampled] += 1
        full = slots.length[sampled] - slots.prompt_length[sampled] >= slots.limit[sampled]
        # The last token of the limit requires no keys and values: its slot computes nothing more.
        slots.computed[sampled[full]] = slots.length[sampled[full]]
        return sampled

    def close(self, slots: Int64) -> list[int]:
        """Close slots whose samples have ended. Return the prompts without samples left, whose pages are freed except those
        that the next prompt shares."""
        touched = self._leave(slots)
        finished = [prompt for prompt in touched if prompt.finished]
        self.tree.release(finished, [prompt for prompt in touched if prompt.has_nan])
        return [prompt.request for prompt in finished]

    def requeue(self, slot: int, *, spoilt: bool = False) -> None:
        """Requeue a running sample, keeping the tokens received. A `spoilt` sample is to be computed again alone, and no other
        sample shares its pages or its prompt's."""
        request, sample = int(self.slots.request[slot]), int(self.slots.sample[slot])
        prompt, place = self.tree[request], np.array([slot])
        if spoilt:
            prompt.has_nan = True
            prompt.alone.add(sample)
        self.tree.requeue(prompt, sample, self.slots.read(place)[0])
        self._leave(place)
        if prompt.has_nan:
            self.tree.release([], [prompt])

    def cancel(self, prompt: int, from_sample: int) -> list[int]:
        """Remove the samples of a prompt from this number on, running ones included. Return their numbers. Call `settle` for
        the prompt afterwards."""
        slots, begun = self.slots, self.tree.begun(prompt)
        gone = self.take_unadmitted(prompt, from_sample).tolist()
        if begun is not None:
            running = slots.order[(slots.request[slots.order] == prompt) & (slots.sample[slots.order] >= from_sample)]
            preempted = [sample for sample in begun.preempted if sample >= from_sample]
            gone += [*slots.sample[running].tolist(), *preempted]
            for sample in preempted:
                del begun.preempted[sample]
            self._leave(running)
        return gone

    def take_unadmitted(self, prompt: int, from_sample: int) -> Int32:
        """Remove those samples of a prompt from this number on that have never been admitted. Return their numbers. Call
        `settle` for the prompt afterwards."""
        samples, begun = self.tree.unadmitted(prompt), self.tree.begun(prompt)
        self._work.cut(prompt, from_sample)
        if begun is not None:
            begun.samples = np.concatenate((begun.samples[: begun.next_sample], samples[samples < from_sample]))
        return samples[samples >= from_sample]

    def settle(self, prompts: Int32) -> None:
        """Clean up after samples of these prompts have been removed: drop prompts without samples, and free unused pages."""
        unbegun = prompts[prompts >= self._work.next]
        self._work.take_out(unbegun[[len(self._work.samples(prompt)) == 0 for prompt in unbegun.tolist()]])
        begun = (self.tree.begun(prompt) for prompt in prompts.tolist())
        self.tree.settle([prompt for prompt in begun if prompt is not None])

    def drop(self, request: int) -> list[tuple[int, Generated | None]]:
        """Drop a prompt that has no pages. Return its remaining samples, each with its output, or None if it has none."""
        if self.tree.begun(request) is None:
            return [(sample, None) for sample in self._work.samples(request).tolist()]
        prompt = self.tree.drop(request)
        return [prompt.take_sample() for _ in range(prompt.num_pending)]

    def suspend_idle(self, keep: int = -1) -> int:
        """Suspend every prompt without running samples except `keep`, freeing its pages. Return how many were freed."""
        return self.tree.suspend_idle(keep)

    def lose(self) -> None:
        """Requeue every running sample, in the order of admission, after the worker and all that it computed are lost."""
        slots = self.slots
        for slot in slots.order[np.argsort(slots.admitted[slots.order])].tolist():
            self.requeue(slot)
            self._counts.requeued += 1
        self.suspend_idle()

    def resize(self, num_pages: int) -> None:
        """Change the number of pages; none may be held."""
        self.pool.resize(num_pages)

    def widen(self) -> None:
        """Enlarge the output buffers for the log-probabilities that added sampling parameters report."""
        self.slots.outputs.widen(int(self._work.logprobs.max(initial=-1)))

    def first_prompt(self) -> int:
        """Return the number of the first prompt that is open, suspended or in a slot, or else of the next one to begin."""
        first = self._work.next if self.tree.first is None else min(self._work.next, self.tree.first)
        return min(first, int(self.slots.request[self.slots.order].min(initial=first)))

    def forget(self, count: int, kept: Int32) -> None:
        """See `Work.forget`; `kept` is what it returned."""
        slots = self.slots
        slots.request[slots.order] -= count
        slots.params[slots.order] = np.searchsorted(kept, slots.params[slots.order])
        self.tree.forget(count)

    def restrict(self, num_slots: int) -> None:
        """Reduce the number of slots; none may be in use."""
        self.slots.restrict(num_slots)

    def misfits(self, prompts: Int32) -> Int32:
        """Return those of these prompts whose longest possible sample does not fit the cache or the page table."""
        most = min(self.pool.num_pages, self._max_pages_per_slot + 1)
        return prompts[self._work.num_pages(prompts, self.page_size) > most]

    def take_changes(self) -> CacheChanges:
        """Return the changes since the last call."""
        opened, cells, copies = self.opened, self._cells, self._copies
        self._opened, self._cells, self._copies = [], [], []
        return CacheChanges(
            opened=opened,
            cells=Cells(*(np.concatenate(part) for part in zip(*cells, strict=True)))
            if cells
            else Cells(_NO_SLOTS, _NONE, _NONE),
            copy_src=np.concatenate([src for src, _ in copies]) if copies else _NONE,
            copy_dst=np.concatenate([dst for _, dst in copies]) if copies else _NONE,
            clear_pages=self.pool.take_to_clear(),
        )

    def check_integrity(self) -> None:
        """Assert that page references, slots and prompts agree; for tests, after any operation."""
        slots = self.slots
        self.pool.check_integrity(np.concatenate((self.tree.check_integrity(), slots.own_pages(slots.order))))
        assert (np.diff(slots.request[slots.order]) >= 0).all(), "slots are not in plan order"
        assert len(np.unique(slots.order)) == len(slots.order) == slots.num_slots - slots.num_free, "slots are lost or doubled"
        for slot in slots.order:
            prompt, shared = self.tree[int(slots.request[slot])], int(slots.shared_pages[slot])
            same = np.array_equal(slots.page_table[slot, :shared], prompt.pages[:shared])
            assert same, "a slot reads pages it does not share"
            computed = min(int(slots.computed[slot]), int(slots.prompt_length[slot] + slots.limit[slot]) - 1)
            assert slots.num_pages[slot] * self.page_size >= computed, "a slot is missing pages"
        live = {int(r): int(c) for r, c in zip(*np.unique(slots.request[slots.order], return_counts=True), strict=True)}
        assert all(prompt.live == live.get(prompt.request, 0) for prompt in self.tree), "live counts differ"

    def _admit(self, forks: list[PromptPages], counts: Int32, leads: list[PromptPages], budget: int) -> Runs:
        """Open slots for `counts[i]` samples of each computed prompt `forks[i]`, and for one sample of each of `leads`, which
        computes the prompt in the prompt's own pages. Return what they compute in this step. Each slot gets the page of its
        first token, even if the budget leaves it no token to compute yet."""
        slots, prompts, num_forks = self.slots, [*forks, *leads], int(counts.sum())
        counts = np.append(counts, np.ones(len(leads), np.int32))
        taken = [prompt.take_sample() for prompt, count in zip(prompts, counts.tolist(), strict=True) for _ in range(count)]
        request = np.repeat(np.array([prompt.request for prompt in prompts], np.int32), counts)
        opened = slots.open(request, np.array([sample for sample, _ in taken], np.int32))
        self._opened.append(opened)
        self._share(opened, counts, [*(p.pages[: p.full] for p in forks), *(p.pages for p in leads)])
        start = self._work.length[request] - 1
        start[num_forks:] = [prompt.computed for prompt in leads]
        self._fill(opened, request, start, [output for _, output in taken])
        ends = slots.length[opened]
        if leads:
            for prompt, slot in zip(leads, opened[num_forks:].tolist(), strict=True):
                prompt.leader = slot
                prompt.live += 1
            if self._work.has_texts:
                # Stop at the prompt's end: what the next prompt inherits must be computed in this step.
                leading = np.arange(len(opened)) >= num_forks
                ends = np.where(leading & self._work.of_texts(request), slots.prompt_length[opened], ends)
        take = slots.prefill_chunks(opened, ends, budget)
        if int(self.missing_pages(opened, np.maximum(take, 1)).sum()) > self.pool.num_free:
            # Preempted samples are long: begin with one token each, which requires at most one page.
            take = np.minimum(take, 1)
        self.grow(opened, np.maximum(take, 1))
        self._copy_last_pages(opened[:num_forks], forks, counts[: len(forks)])
        return Runs(opened[take > 0], take[take > 0])

    def _fill(self, opened: Int64, requests: Int32, start: Int32, outputs: list[Generated | None]) -> None:
        """Set the columns of newly opened slots, computed up to `start`, and restore the outputs of preempted samples."""
        slots, counts = self.slots, self._counts
        length, params = self._work.length[requests], self._work.params[requests]
        slots.prompt_length[opened] = slots.length[opened] = length
        slots.params[opened], slots.limit[opened] = params, self._work.max_tokens[params]
        slots.outputs.open(opened, self._work.logprobs[params])
        slots.computed[opened] = slots.sample_counts.cached_tokens[opened] = start
        counts.prompt_tokens += int(length.sum())
        counts.cached_tokens += int(start.sum())
        for i, output in enumerate(outputs):
            if output is not None:
                slot = int(opened[i])
                counts.prompt_tokens -= int(length[i])
                counts.cached_tokens -= int(start[i])
                slots.restore(slot, output)
                slots.length[slot] += len(output.tokens)
                counts.recomputed_tokens += int(slots.length[slot] - start[i])
            if self._work.continuations is not None:
                # A given text is a sample of which all but the last token is known.
                slot, given = int(opened[i]), self._work.continuation(int(requests[i]), int(slots.sample[opened[i]]))
                slots.limit[slot] = len(given)
                if output is None:
                    slots.outputs.restore(slot, Generated(given[:-1]))
                    slots.length[slot] += len(given) - 1
            elif output is None and self._work.given[requests[i]]:
                slot, given = int(opened[i]), self._work.given_tokens(int(requests[i]))
                # If no token is to be drawn after the text, its last token is drawn instead, and replaced later.
                known = min(len(given), int(slots.limit[slot]) - 1)
                slots.outputs.restore(slot, unscored(given[:known], int(self._work.logprobs[params[i]])))
                slots.length[slot] += known

    def _share(self, opened: Int64, counts: Int32, pages: list[Int32]) -> None:
        """Enter shared pages in the first columns of the slots' page tables: `pages[i]` for `counts[i]` slots in turn."""
        sizes = np.array([len(each) for each in pages], np.int32)
        shared = np.repeat(sizes, counts)
        owner = np.repeat(opened, shared)
        column = np.arange(len(owner), dtype=np.int32) - np.repeat(np.cumsum(shared) - shared, shared).astype(np.int32)
        page = np.concatenate(pages)[column + np.repeat(np.repeat(np.cumsum(sizes) - sizes, counts), shared)]
        self.slots.page_table[owner, column] = page
        self.slots.shared_pages[opened] = self.slots.num_pages[opened] = shared
        self._cells.append(Cells(owner, column, page))

    def _copy_last_pages(self, opened: Int64, prompts: list[PromptPages], counts: Int32) -> None:
        """Copy each prompt's last page, if it is partly filled, to the first own page of each of its `counts[i]` slots."""
        slots = self.slots
        partial = (slots.prompt_length[opened] - 1) % self.page_size > 0
        if partial.any():
            tail = [prompt.pages[prompt.full] if prompt.full < len(prompt.pages) else 0 for prompt in prompts]
            copied = opened[partial]
            self._copies.append(
                (np.repeat(np.array(tail, np.int32), counts)[partial], slots.page_table[copied, slots.shared_pages[copied]])
            )

    def _leave(self, slots: Int64) -> list[PromptPages]:
        """Close slots, free their own pages, and update the prompts of their samples. Return these prompts."""
        left: dict[int, PromptPages] = {}
        for slot, request in zip(slots.tolist(), self.slots.request[slots].tolist(), strict=True):
            left[request] = prompt = self.tree[request]
            prompt.leader = -1 if prompt.leader == slot else prompt.leader
            prompt.live -= 1
        if len(own := self.slots.own_pages(slots)):
            self.pool.free(own)
        self.slots.close(slots)
        return list(left.values())
