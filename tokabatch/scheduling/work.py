"""The prompts of a scheduler, in plan order, and which of them have not begun.

Work is open-ended: prompts are appended, those not begun can be removed, and finished ones at the front can be forgotten. A
removed prompt keeps its number; the common prefix stored for a prompt is always the one with the nearest earlier prompt that
has not been removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.contracts import Requests, SamplingParams


class Work:
    """A table over R prompts, numbered in plan order; columns as in `Requests`."""

    def __init__(self, requests: Requests) -> None:
        self._parts = [requests]
        self._first = np.zeros(1, np.int64)
        """The number of the first prompt of each part."""
        self.row_index: Int64 = requests.row_index
        self.key: Int64 = _keys(requests)
        """The row number that seeds each prompt's random numbers, shape [R]."""
        self.start: Int64 = requests.start
        self.length: Int32 = requests.length
        self.lcp: Int32 = requests.lcp
        self.params: Int32 = requests.params
        self.given: Int32 = _given(requests)
        """The number of tokens after each prompt that are scored before one is drawn, shape [R]."""
        self._any_given = bool(self.given.any())
        self.continuations = requests.continuations
        """The given texts, shared by all prompts added later."""
        self._places: dict[SamplingParams, int] | None = None
        """The index of each entry of `sampling`; None until it is needed."""
        self.sampling: tuple[SamplingParams, ...] = ()
        self.max_tokens: Int32 = np.zeros(0, np.int32)
        """`max_tokens` of each entry of `sampling`; `logprobs` likewise, -1 for none."""
        self.logprobs: Int32 = self.max_tokens
        self._add_sampling(requests.sampling)
        self.num_samples: Int64 = requests.num_samples()
        """The number of samples to draw from each prompt, shape [R]."""
        self._until: dict[int, int] = {}
        """By prompt that has been cut: the first sample number that is not drawn."""
        self._dropped = np.zeros(len(requests), np.bool_)
        self._by_row: Int64 | None = None
        """The first prompts of the table, sorted by row; None until a row is looked up."""
        self.next = 0
        """The first prompt that has never been begun."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def exhausted(self) -> bool:
        """Whether every prompt has been begun or removed."""
        return self.next >= len(self)

    def samples(self, prompt: int) -> Int32:
        """Return the numbers of the samples to draw from one prompt, ascending."""
        part = self._part(prompt)
        samples = self._parts[part].samples(prompt - int(self._first[part]))
        return samples[samples < self._until[prompt]] if prompt in self._until else samples

    def tokens_at(self, prompt: Int32, position: Int64) -> Int32:
        """Return one token of each of these prompts (repeats allowed), shape [N]."""
        place = self.start[prompt] + position
        if len(self._parts) == 1:
            return self._parts[0].tokens[place]
        part = np.searchsorted(self._first, prompt, side="right") - 1
        tokens = np.empty(len(place), np.int32)
        for number in np.unique(part).tolist():
            tokens[part == number] = self._parts[number].tokens[place[part == number]]
        return tokens

    def continuation(self, prompt: int, sample: int) -> Int32:
        """Return the tokens that are scored in place of a sample."""
        assert self.continuations is not None
        return self.continuations.of(int(self.row_index[prompt]), sample)

    @property
    def has_texts(self) -> bool:
        """Whether any prompt is followed by a given text."""
        return self.continuations is not None or self._any_given

    def of_texts(self, prompts: Int32) -> Bool:
        """Return for each of these prompts whether its samples are, or begin with, a given text."""
        return np.ones(len(prompts), np.bool_) if self.continuations is not None else self.given[prompts] > 0

    def given_tokens(self, prompt: int) -> Int32:
        """Return the tokens after a prompt that are scored before one is drawn."""
        part = self._part(prompt)
        begin = int(self.start[prompt] + self.length[prompt])
        return self._parts[part].tokens[begin : begin + int(self.given[prompt])]

    def num_pages(self, prompts: Int32, page_size: int) -> Int32:
        """Return the pages that the longest possible sample of each of these prompts takes, plus one for the prompt's own last
        page, of which the sample has a copy."""
        return -(-(self.length[prompts] + self.max_tokens[self.params[prompts]]) // page_size) + 1

    def upcoming(self, count: int) -> Int32:
        """Return the next prompts to begin, at most `count`."""
        size = count
        while True:
            stop = min(self.next + size, len(self))
            stays = np.flatnonzero(~self._dropped[self.next : stop]) + self.next
            if len(stays) >= count or stop == len(self):
                return stays[:count].astype(np.int32)
            # Some were removed: search further, without a pass over all prompts.
            size *= 2

    def not_begun(self) -> Int32:
        """Return all prompts that can still be begun, ascending."""
        return (np.flatnonzero(~self._dropped[self.next :]) + self.next).astype(np.int32)

    def of_row(self, row: int) -> list[int]:
        """Return the prompts of a row that have not been removed: several if its samples were added in parts."""
        if self._by_row is None or len(self) > 2 * len(self._by_row):
            self._by_row = np.argsort(self.row_index, kind="stable")
        # Those added since the rows were sorted are searched one by one.
        ordered = self.row_index[: len(self._by_row)]
        first, stop = (int(np.searchsorted(ordered, row, side, sorter=self._by_row)) for side in ("left", "right"))
        added = np.flatnonzero(self.row_index[len(ordered) :] == row) + len(ordered)
        prompts = np.concatenate((self._by_row[first:stop], added))
        return prompts[~self._dropped[prompts]].tolist()

    def begin(self, count: int) -> None:
        """Mark the first `count` prompts of `upcoming` as begun."""
        self.next = self._from(int(self.upcoming(count)[-1]) + 1)

    def extend(self, requests: Requests) -> Int32:
        """Append prompts. Return their numbers."""
        first, there, params = len(self), np.flatnonzero(~self._dropped), requests.params
        if requests.sampling is not self.sampling and requests.sampling != self.sampling[: len(requests.sampling)]:
            if self._places is None:
                self._places = {kind: place for place, kind in enumerate(self.sampling)}
            fresh = [kind for kind in dict.fromkeys(requests.sampling) if kind not in self._places]
            self._places |= {kind: place for place, kind in enumerate(fresh, len(self.sampling))}
            if fresh:
                self._add_sampling(fresh)
            params = np.array([self._places[kind] for kind in requests.sampling], np.int32)[params]
        for name in ("row_index", "start", "length", "lcp"):
            setattr(self, name, np.concatenate((getattr(self, name), getattr(requests, name))))
        self.key = np.concatenate((self.key, _keys(requests)))
        self.given = np.concatenate((self.given, _given(requests)))
        self._any_given = bool(self.given.any())
        self.params = np.concatenate((self.params, params))
        self.num_samples = np.concatenate((self.num_samples, requests.num_samples()))
        self._dropped = np.concatenate((self._dropped, np.zeros(len(requests), np.bool_)))
        self._parts.append(requests)
        self._first = np.append(self._first, first)
        if len(requests):
            self.lcp[first] = common_prefix(self._prompt(int(there[-1])), self._prompt(first)) if len(there) else 0
        return np.arange(first, len(self), dtype=np.int32)

    def forgettable(self, needed: int) -> int:
        """Return how many of the prompts below number `needed`, all finished or removed, can be passed to `forget`."""
        return int(self._first[np.searchsorted(self._first, min(needed, self.next), side="right") - 1])

    def forget(self, count: int) -> Int32:
        """Forget the first `count` prompts, which are finished, and reduce the numbers of the others by `count`. Forget
        sampling parameters that no other prompt has, too. Return the entries of `sampling` that are kept, ascending."""
        part = int(np.searchsorted(self._first, count))
        self._parts, self._first = self._parts[part:], self._first[part:] - count
        for name in ("row_index", "key", "given", "start", "length", "lcp", "params", "num_samples", "_dropped"):
            setattr(self, name, getattr(self, name)[count:].copy())
        self.lcp[:1] = 0
        kept, self.params = (each.astype(np.int32) for each in np.unique(self.params, return_inverse=True))
        self._places = self._by_row = None
        self.sampling = tuple(self.sampling[kind] for kind in kept.tolist())
        self.max_tokens, self.logprobs = self.max_tokens[kept], self.logprobs[kept]
        self._until = {prompt - count: until for prompt, until in self._until.items() if prompt >= count}
        self.next -= count
        return kept

    def take_out(self, prompts: Int32) -> None:
        """Remove prompts that have not been begun, ascending."""
        if not len(prompts):
            return
        self._dropped[prompts] = True
        if self.lcp is self._parts[0].lcp:
            self.lcp = self.lcp.copy()
        # The common prefix of two prompts that are kept is the shortest of those in between.
        successor = 0
        for prompt in prompts.tolist():
            if successor <= prompt:
                successor = self._from(prompt)
            if successor < len(self):
                self.lcp[successor] = min(self.lcp[successor], self.lcp[prompt])
        self.next = self._from(self.next)

    def cut(self, prompt: int, until: int) -> None:
        """Exclude the samples of a prompt from number `until` on."""
        self._until[prompt] = min(until, self._until.get(prompt, until))

    def part_of(self, prompts: Int32) -> Int64:
        """Return the index of the part that each prompt belongs to; a part is the prompts of one call of `extend`, or of the
        constructor."""
        return np.searchsorted(self._first, prompts, side="right") - 1

    def requests(self, prompts: Int32, spans: tuple[Int32, Int32]) -> Requests:
        """Return these prompts, ascending and of one part, each with the samples from the first of `spans` up to the second."""
        part = self._part(int(prompts[0]))
        return replace(self._parts[part].take(prompts - int(self._first[part])), span=spans)

    def _add_sampling(self, fresh: Sequence[SamplingParams]) -> None:
        """Append entries to `sampling`, of which there are as many as prompts if each request has its own seed."""
        self.sampling = (*self.sampling, *fresh) if self.sampling else tuple(fresh)
        self.max_tokens = np.append(self.max_tokens, np.array([params.max_tokens for params in fresh], np.int32))
        # Given tokens are reported by their scores, not by the draw.
        drawn = [-1 if params.logprobs is None or self.continuations is not None else params.logprobs for params in fresh]
        self.logprobs = np.append(self.logprobs, np.array(drawn, np.int32))

    def _part(self, prompt: int) -> int:
        return 0 if len(self._parts) == 1 else int(np.searchsorted(self._first, prompt, side="right")) - 1

    def _prompt(self, prompt: int) -> Int32:
        part = self._part(prompt)
        return self._parts[part].prompt(prompt - int(self._first[part]))

    def _from(self, prompt: int) -> int:
        """Return the first prompt from this number on that has not been removed."""
        ahead = self._dropped[prompt:]
        return prompt + int(ahead.argmin()) if len(ahead) and not ahead.all() else len(self)


def _keys(requests: Requests) -> Int64:
    return requests.row_index if requests.key is None else requests.key


def _given(requests: Requests) -> Int32:
    return np.zeros(len(requests), np.int32) if requests.given is None else requests.given


def common_prefix(a: Int32, b: Int32) -> int:
    """Return how many leading elements two arrays have in common."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size
