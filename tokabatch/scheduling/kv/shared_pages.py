"""The open prompts in plan order as arrays: how many pages each has, and how many it shares with its predecessor.

Plan order is a depth-first walk of the prefix tree, so two prompts share the minimum of what the neighbours between them share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Int32

_CAPACITY = 16


class SharedPages:
    """Sorted arrays over open prompts. In steady state prompts are appended, which costs least; they are removed anywhere."""

    def __init__(self) -> None:
        self._request, self._shared, self._sizes = (np.zeros(_CAPACITY, np.int32) for _ in range(3))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def requests(self) -> Int32:
        """The numbers of the open prompts, ascending."""
        return self._request[: self._count]

    @property
    def shared(self) -> Int32:
        """The number of leading pages that each prompt shares with its predecessor; 0 for the first."""
        return self._shared[: self._count]

    @property
    def sizes(self) -> Int32:
        """The number of pages of each prompt."""
        return self._sizes[: self._count]

    def places(self, requests: Int32) -> npt.NDArray[np.int64]:
        """Return the indices of these prompts, given in ascending order; all must be open."""
        if len(requests) == self._count:
            return np.arange(self._count)
        return np.searchsorted(self.requests, requests)

    def shared_between(self, requests: Int32) -> Int32:
        """Return the pages that each of these prompts, given in ascending order, shares with the one before it in `requests`; 0
        for the first."""
        shared = np.zeros(len(requests), np.int32)
        if len(requests) == self._count:
            shared[1:] = self.shared[1:]
        elif len(requests) > 1:
            place = self.places(requests)
            shared[1:] = np.minimum.reduceat(self._shared[: place[-1] + 1], place[:-1] + 1)
        return shared

    def any_shared(self, pages: int) -> bool:
        """Return whether any two neighbours share at least so many pages."""
        return bool((self.shared >= pages).any())

    def attributed(self) -> Int32:
        """Return the number of pages of each prompt, counting a shared page only for the last prompt that shares it."""
        attributed = self.sizes.copy()
        attributed[:-1] -= self.shared[1:]
        return attributed

    def append(self, requests: Sequence[int], sizes: Sequence[int], shared: Int32) -> None:
        """Append prompts after all others."""
        self._reserve(len(requests))
        span = slice(self._count, self._count + len(requests))
        self._request[span], self._sizes[span], self._shared[span] = requests, sizes, shared
        self._count += len(requests)

    def insert(self, request: int, size: int, shared: int, shared_after: int) -> None:
        """Insert a prompt in order; `shared_after` is the number of pages that its successor, if any, then shares with it."""
        self._reserve(1)
        place = int(np.searchsorted(self.requests, request))
        for array in (self._request, self._shared, self._sizes):
            array[place + 1 : self._count + 1] = array[place : self._count]
        self._count += 1
        self._request[place], self._sizes[place], self._shared[place] = request, size, shared
        self._shared[place + 1 : min(place + 2, self._count)] = shared_after

    def around(self, request: int) -> tuple[int | None, int | None]:
        """Return the predecessor and the successor of a request that is not open, None where there is none."""
        place = int(np.searchsorted(self.requests, request))
        before = int(self._request[place - 1]) if place else None
        return before, int(self._request[place]) if place < self._count else None

    def cut(self, request: int, size: int) -> None:
        """Reduce a prompt to its first `size` pages."""
        place = int(np.searchsorted(self.requests, request))
        self._sizes[place] = size
        around = slice(place, min(place + 2, self._count))
        self._shared[around] = np.minimum(self._shared[around], size)

    def remove(self, requests: Sequence[int]) -> None:
        """Remove prompts. Two that become neighbours share the minimum over the prompts removed between them."""
        stays = np.ones(self._count, np.bool_)
        stays[np.searchsorted(self.requests, requests)] = False
        keep = np.flatnonzero(stays)
        if len(keep):
            merged = np.minimum.reduceat(self._shared[: keep[-1] + 1], np.append(0, keep[:-1] + 1))
            merged[0] = 0
            for array, kept in ((self._shared, merged), (self._request, self._request[keep]), (self._sizes, self._sizes[keep])):
                array[: len(keep)] = kept
        self._count = len(keep)

    def renumber(self, count: int) -> None:
        """Subtract `count` from the numbers of all prompts."""
        self._request[: self._count] -= count

    def _reserve(self, count: int) -> None:
        while self._count + count > len(self._request):
            self._request, self._shared, self._sizes = (
                np.concatenate((array, np.zeros_like(array))) for array in (self._request, self._shared, self._sizes)
            )
