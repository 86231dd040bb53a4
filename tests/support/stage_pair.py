"""Two pipeline stages in one process: captured steps, and messages that go through `PeerLink` over scripted signals."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch

from support.captured_worker import DTYPE, captured_worker
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import Launched, Worker
from tokabatch.parallel.collectives import SENDING
from tokabatch.parallel.mesh import Mesh
from tokabatch.parallel.peer_links import PeerLink, PeerLinks
from tokabatch.scheduling.contracts import StepBatch, StepResult


class Flags:
    """The signals of one rank of a pair. What would wait for the other rank fails: in one thread it would do so for ever."""

    def __init__(self, rank: int, are_set: set[tuple[int, int]]) -> None:
        self._rank, self._are_set = rank, are_set

    def put_signal(self, dst_rank: int, channel: int) -> None:
        assert (dst_rank, channel) not in self._are_set, "the last signal was not waited for"
        self._are_set.add((dst_rank, channel))

    def wait_signal(self, src_rank: int, channel: int) -> None:
        assert src_rank == 1 - self._rank
        self._are_set.remove((self._rank, channel))


class StagePair:
    """A worker in two stages. The second stage computes a step as late as it can: when the first
    one has as many messages on their way as there are slots, or when the step's result is collected."""

    def __init__(self, folder: Path, sizes: ReplicaSizes, device: torch.device, captured_tokens: tuple[int, int]) -> None:
        """`captured_tokens` of each stage; larger steps run kernel by kernel."""
        self.sizes = sizes
        self._stages: list[Worker] = []
        self._sent: deque[StepBatch] = deque()
        self._launched: deque[Launched] = deque()
        flags = set[tuple[int, int]]()
        slots: list[torch.Tensor] = []
        for rank in range(2):
            worker = captured_worker(folder, sizes, device, Mesh(rank, 1, 2), captured_tokens[rank])
            columns = worker._decoder.spec.hidden_size
            room = SENDING, sizes.max_step_tokens, columns
            slots = slots or list(torch.full(room, torch.nan, dtype=DTYPE, device=device).unbind())
            link = PeerLink(Flags(rank, flags), 1 - rank, slots)
            worker._decoder.peer_links = PeerLinks(*((None, link) if rank == 0 else (link, None)), slots[0])
            self._stages.append(worker)

    def submit(self, step: StepBatch) -> None:
        if len(self._sent) == SENDING:
            self._take()
        assert self._stages[0].launch(step).wait().token.size == 0
        self._sent.append(step)

    def collect(self) -> StepResult:
        if not self._launched:
            self._take()
        return self._launched.popleft().wait()

    def make_ahead(self) -> None:
        for stage in self._stages:
            stage.make_ahead()

    def _take(self) -> None:
        self._launched.append(self._stages[1].launch(self._sent.popleft()))
