"""Medians of repeated work: CUDA events on a GPU, the clock on a CPU, which serves to try the code out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]


class Timer:
    """Times work on one device. What is compared runs in turn, so that clocks and heat are the same for all of it."""

    def __init__(self, device: torch.device, warm_ups: int = 5, repeats: int = 20) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._warm_ups = warm_ups
        self._repeats = repeats

    def captured(self, work: Work) -> Work:
        """The work as a CUDA graph, so that no launch shows; on a CPU the work itself."""
        if not self.is_cuda:
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def medians(self, works: Sequence[Work]) -> list[float]:
        """Milliseconds of each."""
        spans = [[self._span(work) for work in works] for _ in range(self._warm_ups + self._repeats)][self._warm_ups :]
        self.wait()
        return [statistics.median(span() for span in column) for column in zip(*spans, strict=True)]

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _span(self, work: Work) -> Callable[[], float]:
        """Runs the work; the result reads its milliseconds once the device has come so far."""
        if self.is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            return lambda: begin.elapsed_time(end)
        started = time.perf_counter()
        work()
        took = (time.perf_counter() - started) * 1e3
        return lambda: took
