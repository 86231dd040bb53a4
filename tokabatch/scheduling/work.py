"""The prompts that a scheduler has been given, in plan order, and which of them it has still to begin.

Prompts that are dropped keep their numbers; the common prefix noted for a prompt is always the one with the last before it that
has not been dropped.
"""

from __future__ import annotations

import numpy as np

from tokabatch.messages import Int32, Int64, Requests


class Work:
    """A table over R prompts, numbered in plan order; columns as in `Requests`."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.row_index: Int64 = requests.row_index
        self.start: Int64 = requests.start
        self.tokens: Int32 = requests.tokens
        self.length: Int32 = requests.length
        self.lcp: Int32 = requests.lcp
        self.params: Int32 = requests.params
        self.sampling = requests.sampling
        self.max_tokens = np.array([params.max_tokens for params in self.sampling], np.int32)
        """Of each entry of `sampling`."""
        self._dropped = np.zeros(len(requests), np.bool_)
        self.next = 0
        """The first prompt that has never been begun."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def exhausted(self) -> bool:
        """Every prompt has been begun or dropped."""
        return self.next >= len(self)

    def samples(self, prompt: int) -> Int32:
        """The numbers of the samples to draw from one prompt, ascending."""
        return self._requests.samples(prompt)

    def num_samples(self) -> Int64:
        """How many samples are to be drawn from each prompt, shape [R]."""
        return self._requests.num_samples()

    def upcoming(self, count: int) -> Int32:
        """The next prompts to begin, at most `count`."""
        window = np.arange(self.next, min(self.next + count, len(self)), dtype=np.int32)
        if not self._dropped[window].any():
            return window
        return (np.flatnonzero(~self._dropped[self.next :])[:count] + self.next).astype(np.int32)

    def begin(self, count: int) -> None:
        """The first `count` of `upcoming` are begun."""
        self._move_to(int(self.upcoming(count)[-1]) + 1)

    def num_pages(self, prompts: Int32, page_size: int) -> Int32:
        """Pages that a cache needs for a longest sample of each of these prompts, and one for the prompt's own last page, of
        which the sample has a copy."""
        return -(-(self.length[prompts] + self.max_tokens[self.params[prompts]]) // page_size) + 1

    def drop(self, prompts: Int32) -> Int32:
        """Take out prompts that have not been begun, ascending; returns those that were there."""
        prompts = prompts[(prompts >= self.next) & ~self._dropped[prompts]]
        if not len(prompts):
            return prompts
        self._dropped[prompts] = True
        stays = np.flatnonzero(~self._dropped[self.next :]) + self.next
        if len(stays):
            self.lcp = self.lcp.copy()
            # Between two that stay, the common prefix is the shortest of those in between.
            self.lcp[stays] = np.minimum.reduceat(self.lcp[: stays[-1] + 1], np.append(self.next, stays[:-1] + 1))
        self._move_to(self.next)
        return prompts

    def _move_to(self, prompt: int) -> None:
        left = np.flatnonzero(~self._dropped[prompt:])
        self.next = prompt + int(left[0]) if len(left) else len(self)
