"""CUDA graphs for a ladder of sizes, captured at first use or, if possible, shortly before. They share one memory pool.

This module is independent of steps: `captured` defines what is computed at each size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import torch

FINEST, FINE_STEPS, COARSE_STEPS = 32, 32, 2
"""The smallest distance between sizes, and the number of fine and of coarse sizes from one power of two to the next. Coarse
sizes are captured first."""
SMALL = 1024
"""The largest size up to which powers of two may suffice, as a step takes hardly longer than one of half the size; smaller
sizes are not captured ahead of their first use."""
LEAST_PREPARED = 256
"""The smallest size that is captured before the first step."""
CAPTURE_FLOPS = 1.2e13
"""Floating-point operations that an H100 computes in the 20 ms or so that a capture takes the host."""
LEAST_WORTH, MOST_WORTH = 2048, 16_384
"""The limits of `worth_capturing`. The first bounds the number of graphs, which take memory; the second holds for small models,
whose products are a small part of a step."""

Kind = TypeVar("Kind", bound=Hashable)
Made = TypeVar("Made")


class GraphRecorder:
    """Captures work on a stream of its own. All graphs use the same memory pool for intermediate results, one after another."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def trial(self, work: Callable[[], object]) -> None:
        """Run the work without capturing it, so that kernels are compiled and libraries allocate their persistent buffers."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, work: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
        """Return the graph of the work and what the work returned: tensors that each replay writes."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # `torch.cuda.graph` would empty the allocator's cache each time. Relaxed, because libraries load kernels lazily.
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                made = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, made


def worth_capturing(elements: int) -> int:
    """Return the padding in tokens, summed over the steps that one size would have saved it, from which that size is worth
    capturing: computing so many takes as long as the capture. `elements` is the size of the matrices that a token is multiplied
    with."""
    return int(min(max(CAPTURE_FLOPS / (2 * max(elements, 1)), LEAST_WORTH), MOST_WORTH))


def size_above(count: int, steps: int) -> int:
    """Return the smallest size that is at least `count`, on a ladder with `steps` sizes from one power of two to the next."""
    if count <= FINEST:
        return 1 << max(0, count - 1).bit_length()
    step = max(FINEST, (1 << (count - 1).bit_length() - 1) // steps)
    return -(-count // step) * step


def aligned(count: int) -> int:
    """Return the stride of a column of `count` words, so that columns begin at multiples of 16 bytes, as the kernels assume."""
    return -(-count // 4) * 4


class Ladder(Generic[Kind, Made]):
    """Captured graphs by size and kind; the largest size is `most`. `worth` is as `worth_capturing` returns it."""

    def __init__(self, most: int, make: Callable[[int, Kind], Made], worth: int = MOST_WORTH) -> None:
        self.most = most
        self._make = make
        self._worth = worth
        # The products of so many tokens take as long as reading the weights and launching, a few milliseconds.
        self._small = min(SMALL, max(LEAST_PREPARED, size_above(worth // 8, 1)))
        self._made: dict[tuple[int, Kind], Made] = {}
        self._filled: Counter[tuple[int, Kind]] = Counter()
        self._wanted: list[tuple[int, Kind]] = []
        self._kinds: dict[Kind, None] = {}
        self._last = 0
        self._coarse = sorted(self._coarse_sizes(), reverse=True)

    def coarse(self, count: int) -> int:
        """Return the size of the graph that is captured at first use for `count`."""
        return min(self.most, size_above(count, 1 if count <= self._small else COARSE_STEPS))

    def prepare(self, kind: Kind) -> None:
        """Capture the coarse sizes before the first step, the largest first, so that the others fit into its memory."""
        for size in self._coarse:
            if size >= LEAST_PREPARED or size == self.most:
                self.at(size, kind)

    def at(self, size: int, kind: Kind) -> Made:
        """Return the graph of this size and kind, captured now if it does not exist yet."""
        if (size, kind) not in self._made:
            self._made[size, kind] = self._make(size, kind)
        return self._made[size, kind]

    def size(self, count: int, kind: Kind) -> int:
        """Return the size at which to run `count` tokens or rows, at most `most`.

        It is the next fine size if that has been captured, otherwise the smallest captured size that fits, until a nearer one
        is worth capturing; or the next coarse size, if the padding would be too large.
        """
        self._kinds.setdefault(kind)
        coarse = self.coarse(count)
        fine = coarse if count <= self._small else min(self.most, size_above(count, FINE_STEPS))
        if (fine, kind) in self._made:
            self._last = fine
            return fine
        size = min((size for size, other in self._made if other == kind and size >= count), default=coarse)
        if size - coarse >= self._worth // 4:
            size = coarse
        wanted = fine if size <= coarse else coarse
        before = self._filled[wanted, kind]
        self._filled[wanted, kind] += size - wanted
        if before < self._worth <= self._filled[wanted, kind]:
            self._wanted.append((wanted, kind))
        self._last = size
        return size

    def make_ahead(self) -> bool:
        """Capture one graph for later steps while the device is busy: a size that is worth capturing, or the next smaller
        coarse size, which will be used as samples finish. Return False if there is none."""
        while self._wanted:
            if (wanted := self._wanted.pop()) not in self._made:
                self.at(*wanted)
                return True
        smaller = ((size, kind) for size in self._coarse if self._small <= size < self._last for kind in self._kinds)
        wanted = next((each for each in smaller if each not in self._made), None)
        if wanted is not None:
            self.at(*wanted)
        return wanted is not None

    def _coarse_sizes(self) -> Iterator[int]:
        """Yield the coarse sizes, ascending."""
        size = 0
        while size < self.most:
            size = self.coarse(size + 1)
            yield size
