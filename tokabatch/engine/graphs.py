"""CUDA graphs for a ladder of sizes, captured at first use or, better, shortly before, sharing one memory pool.

Independent of steps: `captured` says what is computed at each size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import torch

FINEST, FINE_STEPS, COARSE_STEPS = 32, 32, 2
"""Sizes from one power of two to the next; few of them are captured at once."""
SMALL = 1024
"""Up to here a step takes hardly longer than one of half the size: a power of two each is enough, none ahead below it."""
LEAST_PREPARED = 256
"""Smallest size that is captured before the first step."""
WORTH = 16_384
"""Tokens that steps of one size were filled up with to a larger one, from which its own graph is worth capturing: that takes
the host some 20 ms. A step alone may be filled up with a quarter of it."""

Kind = TypeVar("Kind", bound=Hashable)
Made = TypeVar("Made")


class GraphRecorder:
    """Captures work on a stream of its own; what graphs compute with between beginning and end is one memory, used in turn."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def trial(self, work: Callable[[], object]) -> None:
        """Run it as it is: kernels are compiled, and libraries allocate what they keep."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, work: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
        """The graph and what the work returned, whose memory is the graph's output from now on."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Not `torch.cuda.graph`, which empties the allocator's cache each time. Relaxed, as libraries load kernels late.
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                made = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, made


def size_above(count: int, steps: int) -> int:
    """Return the smallest size of the ladder that is at least `count`, with `steps` sizes an octave."""
    if count <= FINEST:
        return 1 << max(0, count - 1).bit_length()
    step = max(FINEST, (1 << (count - 1).bit_length() - 1) // steps)
    return -(-count // step) * step


def aligned(count: int) -> int:
    """Words that a column of so many takes: kernels read columns that begin at 16 bytes as they do at capture."""
    return -(-count // 4) * 4


def coarse_size(count: int, most: int) -> int:
    """Return the size of the graph that is captured at first use for `count`."""
    return min(most, size_above(count, 1 if count <= SMALL else COARSE_STEPS))


def coarse_sizes(most: int) -> Iterator[int]:
    """Return all sizes of the ladder, ascending."""
    size = 0
    while size < most:
        size = coarse_size(size + 1, most)
        yield size


class Ladder(Generic[Kind, Made]):
    """What was captured, by size and kind. Sizes end at `most`."""

    def __init__(self, most: int, make: Callable[[int, Kind], Made]) -> None:
        self.most = most
        self._make = make
        self._made: dict[tuple[int, Kind], Made] = {}
        self._filled: Counter[tuple[int, Kind]] = Counter()
        self._worth: list[tuple[int, Kind]] = []
        self._kinds: dict[Kind, None] = {}
        self._last = 0
        self._coarse = sorted(coarse_sizes(most), reverse=True)

    def prepare(self, kind: Kind) -> None:
        """Capture the coarse sizes before the first step: the largest first, so that all else fits into its memory."""
        for size in self._coarse:
            if size >= LEAST_PREPARED or size == self.most:
                self.at(size, kind)

    def at(self, size: int, kind: Kind) -> Made:
        if (size, kind) not in self._made:
            self._made[size, kind] = self._make(size, kind)
        return self._made[size, kind]

    def size(self, count: int, kind: Kind) -> int:
        """The size that `count` tokens or rows, at most `most`, shall run at: the next one where that was captured, else the
        smallest that was, until a nearer one is worth capturing. A coarse one where that would fill up too many."""
        self._kinds.setdefault(kind)
        coarse = coarse_size(count, self.most)
        fine = coarse if count <= SMALL else min(self.most, size_above(count, FINE_STEPS))
        if (fine, kind) in self._made:
            self._last = fine
            return fine
        size = min((size for size, other in self._made if other == kind and size >= count), default=coarse)
        if size - coarse >= WORTH // 4:
            size = coarse
        wanted = fine if size <= coarse else coarse
        before = self._filled[wanted, kind]
        self._filled[wanted, kind] += size - wanted
        if before < WORTH <= self._filled[wanted, kind]:
            self._worth.append((wanted, kind))
        self._last = size
        return size

    def make_ahead(self) -> bool:
        """Capture one for later steps while the device is busy: one that is worth it, or the next smaller coarse size, as
        samples end and fewer are left. False where there is none."""
        while self._worth:
            if (wanted := self._worth.pop()) not in self._made:
                self.at(*wanted)
                return True
        smaller = ((size, kind) for size in self._coarse if SMALL <= size < self._last for kind in self._kinds)
        wanted = next((each for each in smaller if each not in self._made), None)
        if wanted is not None:
            self.at(*wanted)
        return wanted is not None
