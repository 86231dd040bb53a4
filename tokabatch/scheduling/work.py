"""The prompts that a scheduler has been given, in plan order, and which of them it has still to begin.

Work is open-ended: prompts are added behind the last one, those not begun can be taken out, and those at the front that are
finished can be forgotten. A prompt that is taken out keeps its number; the common prefix noted for a prompt is always the one
with the last before it that is still there.
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
        """The row that each prompt's random numbers are drawn for."""
        self.start: Int64 = requests.start
        self.length: Int32 = requests.length
        self.lcp: Int32 = requests.lcp
        self.params: Int32 = requests.params
        self.given: Int32 = _given(requests)
        """Tokens behind each prompt that are scored before one is drawn."""
        self._any_given = bool(self.given.any())
        self.continuations = requests.continuations
        """The same for all that is added later."""
        self._places: dict[SamplingParams, int] | None = None
        """Where each entry of `sampling` stands; None until it is asked for."""
        self.sampling: tuple[SamplingParams, ...] = ()
        self.max_tokens: Int32 = np.zeros(0, np.int32)
        """Of each entry of `sampling`; likewise `logprobs`, -1 for none."""
        self.logprobs: Int32 = self.max_tokens
        self._add_sampling(requests.sampling)
        self.num_samples: Int64 = requests.num_samples()
        """How many samples each prompt has to draw, shape [R]."""
        self._until: dict[int, int] = {}
        """Of prompts that have been cut: the first sample number that is not drawn here."""
        self._dropped = np.zeros(len(requests), np.bool_)
        self._by_row: Int64 | None = None
        """The prompts of a beginning of the table in the order of their rows; None until a row is looked up."""
        self.next = 0
        """The first prompt that has never been begun."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def exhausted(self) -> bool:
        """Every prompt has been begun or taken out."""
        return self.next >= len(self)

    def samples(self, prompt: int) -> Int32:
        """The numbers of the samples to draw from one prompt, ascending."""
        part = self._part(prompt)
        samples = self._parts[part].samples(prompt - int(self._first[part]))
        return samples[samples < self._until[prompt]] if prompt in self._until else samples

    def tokens_at(self, prompt: Int32, position: Int64) -> Int32:
        """One token of each of these prompts (repeats allowed), shape [N]."""
        place = self.start[prompt] + position
        if len(self._parts) == 1:
            return self._parts[0].tokens[place]
        part = np.searchsorted(self._first, prompt, side="right") - 1
        tokens = np.empty(len(place), np.int32)
        for number in np.unique(part).tolist():
            tokens[part == number] = self._parts[number].tokens[place[part == number]]
        return tokens

    def continuation(self, prompt: int, sample: int) -> Int32:
        """The tokens that are scored in the place of a sample."""
        assert self.continuations is not None
        return self.continuations.of(int(self.row_index[prompt]), sample)

    @property
    def has_texts(self) -> bool:
        """Whether any prompt has a given text behind it."""
        return self.continuations is not None or self._any_given

    def of_texts(self, prompts: Int32) -> Bool:
        """Whether a sample of each of these prompts has a given text, all of it or its beginning."""
        return np.ones(len(prompts), np.bool_) if self.continuations is not None else self.given[prompts] > 0

    def given_tokens(self, prompt: int) -> Int32:
        """The tokens behind a prompt that are scored before one is drawn."""
        part = self._part(prompt)
        begin = int(self.start[prompt] + self.length[prompt])
        return self._parts[part].tokens[begin : begin + int(self.given[prompt])]

    def num_pages(self, prompts: Int32, page_size: int) -> Int32:
        """Pages that a cache needs for a longest sample of each of these prompts, and one for the prompt's own last page, of
        which the sample has a copy."""
        return -(-(self.length[prompts] + self.max_tokens[self.params[prompts]]) // page_size) + 1

    def upcoming(self, count: int) -> Int32:
        """The next prompts to begin, at most `count`."""
        size = count
        while True:
            stop = min(self.next + size, len(self))
            stays = np.flatnonzero(~self._dropped[self.next : stop]) + self.next
            if len(stays) >= count or stop == len(self):
                return stays[:count].astype(np.int32)
            # Some were taken out: look further, without a pass over all prompts.
            size *= 2

    def not_begun(self) -> Int32:
        """All prompts that can still be begun, ascending."""
        return (np.flatnonzero(~self._dropped[self.next :]) + self.next).astype(np.int32)

    def of_row(self, row: int) -> list[int]:
        """The prompts of a row that have not been taken out: several where parts of its samples came one after another."""
        if self._by_row is None or len(self) > 2 * len(self._by_row):
            self._by_row = np.argsort(self.row_index, kind="stable")
        # Those added since the rows were sorted are searched one by one.
        ordered = self.row_index[: len(self._by_row)]
        first, stop = (int(np.searchsorted(ordered, row, side, sorter=self._by_row)) for side in ("left", "right"))
        added = np.flatnonzero(self.row_index[len(ordered) :] == row) + len(ordered)
        prompts = np.concatenate((self._by_row[first:stop], added))
        return prompts[~self._dropped[prompts]].tolist()

    def begin(self, count: int) -> None:
        """The first `count` of `upcoming` are begun."""
        self.next = self._from(int(self.upcoming(count)[-1]) + 1)

    def extend(self, requests: Requests) -> Int32:
        """Add prompts behind the last one; their numbers."""
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
        """How many of the prompts below number `needed`, all of them finished or taken out, `forget` can be given."""
        return int(self._first[np.searchsorted(self._first, min(needed, self.next), side="right") - 1])

    def forget(self, count: int) -> Int32:
        """The first `count` prompts are finished: the numbers of the others become less by so many. Sampling parameters that no
        other has are forgotten, too; the entries of `sampling` that are kept, ascending."""
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
        # Between two that stay, the common prefix is the shortest of those in between.
        successor = 0
        for prompt in prompts.tolist():
            if successor <= prompt:
                successor = self._from(prompt)
            if successor < len(self):
                self.lcp[successor] = min(self.lcp[successor], self.lcp[prompt])
        self.next = self._from(self.next)

    def cut(self, prompt: int, until: int) -> None:
        """Draw no sample of a prompt from number `until` on."""
        self._until[prompt] = min(until, self._until.get(prompt, until))

    def part_of(self, prompts: Int32) -> Int64:
        """Which of the calls of `extend` each prompt came with, 0 for those there from the start."""
        return np.searchsorted(self._first, prompts, side="right") - 1

    def requests(self, prompts: Int32, spans: tuple[Int32, Int32]) -> Requests:
        """These prompts, ascending and of one part, with the samples of each from the first of `spans` up to the second."""
        part = self._part(int(prompts[0]))
        return replace(self._parts[part].take(prompts - int(self._first[part])), span=spans)

    def _add_sampling(self, fresh: Sequence[SamplingParams]) -> None:
        """Add entries to `sampling`, of which there are as many as prompts where each request has a seed of its own."""
        self.sampling = (*self.sampling, *fresh) if self.sampling else tuple(fresh)
        self.max_tokens = np.append(self.max_tokens, np.array([params.max_tokens for params in fresh], np.int32))
        # Of given tokens nothing comes with the draw.
        drawn = [-1 if params.logprobs is None or self.continuations is not None else params.logprobs for params in fresh]
        self.logprobs = np.append(self.logprobs, np.array(drawn, np.int32))

    def _part(self, prompt: int) -> int:
        return 0 if len(self._parts) == 1 else int(np.searchsorted(self._first, prompt, side="right")) - 1

    def _prompt(self, prompt: int) -> Int32:
        part = self._part(prompt)
        return self._parts[part].prompt(prompt - int(self._first[part]))

    def _from(self, prompt: int) -> int:
        """The first prompt from this number on that has not been taken out."""
        ahead = self._dropped[prompt:]
        return prompt + int(ahead.argmin()) if len(ahead) and not ahead.all() else len(self)


def _keys(requests: Requests) -> Int64:
    return requests.row_index if requests.key is None else requests.key


def _given(requests: Requests) -> Int32:
    return np.zeros(len(requests), np.int32) if requests.given is None else requests.given


def common_prefix(a: Int32, b: Int32) -> int:
    """How many leading numbers two lists have in common."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size
