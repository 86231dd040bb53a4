"""Prompts that hold KV pages, and which of those pages a new prompt may share.

Requests arrive in plan order, a depth-first walk of the prefix tree, so whatever prompt r can share with the past it can
share with its neighbours in that order. A prompt is *open* from its first admission until its last sample is finished; it
holds one reference to each of its pages, and its samples hold only the pages that they add. The last opened prompt (the
cursor) stays open, trimmed to the computed pages that its successor will share: a page is kept exactly until its last reader
has finished.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.scheduling.generated import Generated
from tokabatch.scheduling.kv.page_pool import PagePool
from tokabatch.scheduling.kv.shared_pages import SharedPages
from tokabatch.scheduling.work import Work, common_prefix


class PromptPages:
    """One prompt's pages and the progress of its samples. `pages` covers the prompt, and the last page may be partly filled;
    `full` counts the pages that every sample can read in place, which leave out the last token, so that a sample computes at
    least one."""

    __slots__ = (
        "alone",
        "computed",
        "full",
        "has_nan",
        "leader",
        "length",
        "live",
        "next_sample",
        "pages",
        "preempted",
        "ready_step",
        "request",
        "samples",
    )

    def __init__(self, request: int, length: int, samples: Int32, page_size: int, pages: Int32, computed: int) -> None:
        self.request = request
        self.length = length
        self.samples = samples
        """The numbers of the samples to draw; those before `next_sample` have been admitted at least once."""
        self.full = (length - 1) // page_size
        self.pages = pages
        self.computed = computed
        """The number of leading prompt tokens whose keys and values are in `pages` once the steps scheduled so far have run."""
        self.ready_step = -1
        """The step that computes the last token required for a fork; forks start in a later step."""
        self.leader = -1
        """The slot whose sample computes the prompt, -1 for none."""
        self.live = 0
        """The number of running samples."""
        self.next_sample = 0
        self.preempted: dict[int, Generated] = {}
        """Requeued samples in the order of readmission, each with its output."""
        self.has_nan = False
        """Whether a sample had logits that are not finite, or is being computed again alone: no other sample may share these
        pages."""
        self.alone: set[int] = set()
        """Samples to compute again in pages that no other sample shares; they are admitted first."""

    @property
    def num_pending(self) -> int:
        """The number of samples to admit."""
        return len(self.samples) - self.next_sample + len(self.preempted)

    def take_sample(self) -> tuple[int, Generated | None]:
        """Remove and return the next sample to admit, preempted ones first: its number and its output, None if it has none."""
        if self.preempted:
            sample = next(iter(self.preempted))
            return sample, self.preempted.pop(sample)
        self.next_sample += 1
        return int(self.samples[self.next_sample - 1]), None

    @property
    def finished(self) -> bool:
        return self.live == 0 and self.num_pending == 0

    def can_fork(self, step: int) -> bool:
        """Return whether samples that begin in this step can share the computed prompt."""
        return self.computed >= self.length - 1 and self.ready_step < step and not self.has_nan

    def advance(self, slot: int, computed: int, step: int) -> None:
        """Record that a step computes a slot's sample up to `computed` tokens; ignored unless that slot computes the prompt."""
        if self.leader == slot:
            self.computed, self.ready_step = min(computed, self.length), step
            if self.computed >= self.length - 1:
                self.leader = -1


class PrefixTree:
    """All prompts with pages or with preempted samples, in plan order, and the physical pages that neighbours share."""

    def __init__(self, work: Work, pool: PagePool, page_size: int) -> None:
        self._work = work
        self._pool = pool
        self._page_size = page_size
        self._open: dict[int, PromptPages] = {}
        self.sharing = SharedPages()
        """The open prompts' page counts and sharing."""
        self._cursor: PromptPages | None = None
        self._suspended: dict[int, PromptPages] = {}
        self._waiting: dict[int, PromptPages] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request: int) -> bool:
        return request in self._open

    def __getitem__(self, request: int) -> PromptPages:
        return self._open[request]

    def __iter__(self) -> Iterator[PromptPages]:
        return iter(self._open.values())

    def with_pending(self) -> list[PromptPages]:
        """Return the open prompts with samples to admit, in plan order."""
        self._waiting = {r: p for r, p in self._waiting.items() if p.num_pending and r in self._open}
        return [self._waiting[r] for r in sorted(self._waiting)]

    def begun(self, request: int) -> PromptPages | None:
        """Return an open or suspended prompt, or None if it is neither."""
        return self._open.get(request) or self._suspended.get(request)

    @property
    def first(self) -> int | None:
        """The number of the first prompt that is open or suspended."""
        return min((*self._open, *self._suspended), default=None)

    def forget(self, count: int) -> None:
        """Subtract `count` from the numbers of all prompts; see `Work.forget`."""
        self.with_pending()
        for prompt in (*self._open.values(), *self._suspended.values()):
            prompt.request -= count
        self._open, self._suspended, self._waiting = (
            {prompt.request: prompt for prompt in prompts.values()} for prompts in (self._open, self._suspended, self._waiting)
        )
        self.sharing.renumber(count)

    def with_unadmitted(self) -> list[PromptPages]:
        """Return the open and suspended prompts with samples that have never been admitted, in plan order."""
        prompts = {**self._open, **self._suspended}
        return [prompts[r] for r in sorted(prompts) if prompts[r].next_sample < len(prompts[r].samples)]

    def unadmitted(self, request: int) -> Int32:
        """Return the numbers of a prompt's samples that have never been admitted, ascending."""
        prompt = self.begun(request)
        if prompt is not None:
            return prompt.samples[prompt.next_sample :]
        samples = self._work.samples(request)
        return samples if request >= self._work.next else samples[:0]

    def requeue(self, prompt: PromptPages, sample: int, output: Generated) -> None:
        """Return a preempted sample, with its output, to those to admit."""
        prompt.preempted[sample] = output
        if sample in prompt.alone:
            prompt.preempted = {sample: output, **prompt.preempted}
        self._waiting[prompt.request] = prompt

    def drop(self, request: int) -> PromptPages:
        """Remove and return a suspended prompt; the caller takes over its pending samples."""
        return self._suspended.pop(request)

    def settle(self, prompts: list[PromptPages]) -> None:
        """Free the pages that no sample will use, after samples of these prompts, or of prompts never begun, have been
        removed."""
        for prompt in prompts:
            if prompt.finished:
                self._suspended.pop(prompt.request, None)
        present = [prompt for prompt in prompts if self._open.get(prompt.request) is prompt]
        self.release([prompt for prompt in present if prompt.finished], [prompt for prompt in present if prompt.has_nan])
        if self._cursor is not None and self._cursor.finished:
            self._trim_cursor(self._cursor)

    def full_pages(self, requests: Int32) -> Int32:
        """Return the number of pages of each prompt that all its samples share."""
        return (self._work.length[requests] - 1) // self._page_size

    def sharable(self, request: int) -> tuple[PromptPages | None, int]:
        """Return the open neighbour that shares the most leading full pages with `request`, and how many; (None, 0) if none."""
        full = (int(self._work.length[request]) - 1) // self._page_size
        best: tuple[PromptPages | None, int] = (None, 0)
        for neighbour in self.sharing.around(request):
            if neighbour is None:
                continue
            low, high = sorted((neighbour, request))
            lcp = int(self._work.lcp[low + 1 : high + 1].min())
            prompt = self._open[neighbour]
            if prompt.has_nan:
                continue
            pages = min(lcp // self._page_size, full, len(prompt.pages), prompt.full)
            if pages > best[1]:
                best = (prompt, pages)
        return best

    def open_next(self, count: int, budget: int, num_pages: int) -> list[PromptPages]:
        """Open up to `count` prompts that were never open before, in order, each sharing what its predecessor holds or is
        about to compute in the same step. Return the opened prompts: fewer if `num_pages` or `budget` tokens run out, and none
        while the pages that the first one shares are not computed."""
        batch, size = self._work.upcoming(count), self._page_size
        first = int(batch[0])
        full = (self._work.length[batch] - 1) // size
        shared = np.minimum(self._work.lcp[batch] // size, full)
        shared[1:] = np.minimum(shared[1:], full[:-1])
        neighbour, shared[0] = self.sharable(first)
        if neighbour is not None and neighbour.computed < shared[0] * size:
            return []
        fresh = -(-self._work.length[batch] // size) - shared
        # What the next prompt inherits must be computed in this step: `budget` may run out only in the last prompt opened.
        computed = np.cumsum(self._work.length[batch] - shared * size)
        count = min(len(batch), int(np.searchsorted(computed, budget)) + 1)
        count = min(count, int(np.searchsorted(np.cumsum(fresh), num_pages, side="right")))
        if count == 0:
            return []
        stops = np.cumsum(fresh[:count])
        allocated = self._pool.allocate(int(stops[-1]))
        opened: list[PromptPages] = []
        previous = neighbour
        for i, stop in enumerate(stops.tolist()):
            own = allocated[stop - fresh[i] : stop]
            pages = own
            if shared[i] and previous is not None:
                inherited = previous.pages[: shared[i]]
                self._pool.retain(inherited)
                pages = np.concatenate((inherited, own))
            request = int(batch[i])
            length, samples = int(self._work.length[request]), self._work.samples(request)
            previous = PromptPages(request, length, samples, size, pages, int(shared[i]) * size)
            opened.append(previous)
        self._append(opened, shared[:count])
        self._work.begin(count)
        cursor, self._cursor = self._cursor, opened[-1]
        if cursor is not None and cursor.finished:
            self._close([cursor])
        return opened

    def reopen(self, request: int) -> PromptPages | None:
        """Give a suspended prompt pages again, and return it. Return None while a neighbour must first compute the shared
        pages, or while too few pages are free."""
        prompt = self._suspended[request]
        alone = next(iter(prompt.preempted), -1) in prompt.alone
        neighbour, shared = (None, 0) if alone else self.sharable(request)
        if neighbour is not None and neighbour.computed < shared * self._page_size:
            return None
        fresh = -(-prompt.length // self._page_size) - shared
        if fresh > self._pool.num_free:
            return None
        del self._suspended[request]
        inherited = neighbour.pages[:shared] if neighbour is not None else prompt.pages[:0]
        self._pool.retain(inherited)
        prompt.pages = np.concatenate((inherited, self._pool.allocate(fresh)))
        prompt.computed, prompt.ready_step, prompt.leader = shared * self._page_size, -1, -1
        prompt.has_nan = alone
        shared, shared_after = (
            0 if neighbour is None else common_prefix(self._open[neighbour].pages, prompt.pages)
            for neighbour in self.sharing.around(request)
        )
        self.sharing.insert(request, len(prompt.pages), shared, shared_after)
        self._open[request] = self._waiting[request] = prompt
        return prompt

    def release(self, finished: list[PromptPages], tainted: list[PromptPages]) -> None:
        """Free the pages of open prompts whose last sample has finished, except what the cursor's successor shares, and all
        pages of tainted prompts without running samples."""
        spoilt = [prompt for prompt in tainted if prompt.live == 0]
        for prompt in spoilt:
            self._suspend(prompt)
        if spoilt:
            self._close(spoilt)
        done = [prompt for prompt in finished if not prompt.has_nan]
        if self._cursor in done:
            done.remove(self._cursor)
            self._trim_cursor(self._cursor)
        if done:
            self._close(done)

    def suspend_idle(self, keep: int = -1) -> int:
        """Free the pages of every prompt without running samples except `keep`, when pages are short. Pending samples compute
        them again later. Return how many pages were freed."""
        before = self._pool.num_free
        idle = [prompt for prompt in self._open.values() if prompt.live == 0 and prompt.request != keep]
        for prompt in idle:
            self._suspend(prompt)
        if idle:
            self._close(idle)
        return self._pool.num_free - before

    def _suspend(self, prompt: PromptPages) -> None:
        """Record a prompt that is about to be closed as suspended, if it has samples to admit."""
        if prompt is self._cursor:
            self._cursor = None
        if prompt.num_pending:
            self._suspended[prompt.request] = prompt

    @property
    def suspended(self) -> list[PromptPages]:
        """Prompts with samples to admit and no pages, in plan order."""
        return [self._suspended[request] for request in sorted(self._suspended)]

    def last_steps(self, requests: Int32, steps: Int32) -> Int32:
        """Return for every open prompt the largest of `steps` (aligned with `requests`, ascending, repeats allowed): how long
        its samples hold its pages. It is 0 without running samples, and the largest int32 with samples still to admit."""
        last = np.zeros(len(self.sharing), np.int32)
        if len(requests):
            first = np.flatnonzero(np.append(True, requests[1:] != requests[:-1]))
            last[self.sharing.places(requests[first])] = np.maximum.reduceat(steps, first)
        waiting = np.array([prompt.request for prompt in self.with_pending()], np.int32)
        last[self.sharing.places(waiting)] = np.iinfo(np.int32).max
        return last

    def check_integrity(self) -> Int32:
        """Assert the order and sharing; return every page reference held here."""
        order = self.sharing.requests.tolist()
        assert sorted(self._open) == order, "the order differs from the open prompts"
        for index in range(1, len(order)):
            before, after = self._open[order[index - 1]].pages, self._open[order[index]].pages
            assert self.sharing.sizes[index] == len(after), "a prompt's page count differs from the one noted"
            assert self.sharing.shared[index] <= common_prefix(before, after), "neighbours share fewer pages than noted"
        finished = [prompt for prompt in self._open.values() if prompt.finished]
        assert all(len(p.pages) * self._page_size <= p.computed for p in finished), "pages that nothing will compute are kept"
        pages = [prompt.pages for prompt in self._open.values()]
        return np.concatenate(pages) if pages else np.zeros(0, np.int32)

    def _trim_cursor(self, cursor: PromptPages) -> None:
        lcp = 0 if self._work.exhausted else int(self._work.lcp[self._work.next])
        # A prompt cancelled during its prefill has no sample to compute the rest, so only computed pages can be shared.
        keep = min(lcp // self._page_size, cursor.full, len(cursor.pages), cursor.computed // self._page_size)
        if keep == 0:
            self._cursor = None
            self._close([cursor])
            return
        self._pool.release(cursor.pages[keep:])
        cursor.pages = cursor.pages[:keep]
        self.sharing.cut(cursor.request, keep)

    def _append(self, prompts: list[PromptPages], shared: Int32) -> None:
        """Append prompts after all others; `shared` counts the pages that each shares with its predecessor in the plan."""
        # The first may share pages with a neighbour other than its direct predecessor.
        before, _ = self.sharing.around(prompts[0].request)
        first = 0 if before is None else common_prefix(self._open[before].pages, prompts[0].pages)
        sizes = [len(prompt.pages) for prompt in prompts]
        self.sharing.append([prompt.request for prompt in prompts], sizes, np.append(first, shared[1:]))
        for prompt in prompts:
            self._open[prompt.request] = self._waiting[prompt.request] = prompt

    def _close(self, prompts: list[PromptPages]) -> None:
        self._pool.release(np.concatenate([prompt.pages for prompt in prompts]))
        for prompt in prompts:
            del self._open[prompt.request]
            prompt.pages = prompt.pages[:0]
            prompt.computed = 0
        self.sharing.remove([prompt.request for prompt in prompts])
