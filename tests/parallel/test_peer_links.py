"""Links and sums through peers' memory: links over files that the ranks map in the place of GPUs' memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tokabatch.parallel import peer_links
from tokabatch.parallel.collectives import all_reduce
from tokabatch.parallel.mesh import Mesh
from tokabatch.parallel.peer_memory import PeerSums

CHANNELS, SECONDS = 8, 20.0
MESSAGES = 7


def mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def wait_until(true, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.0005)


class FileMemory:
    """`torch.distributed._symmetric_memory` as far as links use it. As there, meetings are numbered by the process, and ranks
    find each other by that number."""

    def __init__(self, mesh: Mesh, folder: Path) -> None:
        self._folder, self._rank, self._world = folder, mesh.rank, mesh.tensor_size * mesh.pipeline_size
        self._meetings = count()
        self._flags = mapped(folder / "flags", (self._world, CHANNELS, self._world), torch.int32)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return mapped(self._folder / f"memory-{self._rank}", shape, dtype).fill_(math.nan)

    def rendezvous(self, memory: torch.Tensor, group: str) -> FileMemory:
        number = next(self._meetings)
        (self._folder / f"{group}-{number}-{self._rank}").touch()
        for rank in range(self._world):
            wait_until((self._folder / f"{group}-{number}-{rank}").exists, f"rank {rank}")
        return self

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return mapped(self._folder / f"memory-{rank}", shape, dtype)

    def put_signal(self, dst_rank: int, channel: int) -> None:
        flag = self._flags[dst_rank, channel, self._rank]
        wait_until(lambda: not flag, "the last signal to be taken")
        flag.fill_(1)

    def wait_signal(self, src_rank: int, channel: int) -> None:
        flag = self._flags[self._rank, channel, src_rank]
        wait_until(lambda: bool(flag), f"rank {src_rank} on channel {channel}")
        flag.zero_()


def other_memory(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def no_memory(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    raise RuntimeError("out of memory")


def pass_on(mesh: Mesh, folder: Path, buffer_of_1: Callable[..., torch.Tensor] | None) -> list[float] | None:
    """What arrives on the last stage where each stage adds one to what it gets; None where no links are made."""
    memory = FileMemory(mesh, folder)
    if buffer_of_1 is not None and mesh.rank == 1:
        patch.object(memory, "get_buffer", buffer_of_1).start()
    with (
        patch.object(peer_links, "symmetric_memory", memory),
        patch.object(torch.cuda, "can_device_access_peer", lambda *_: True),
    ):
        links = peer_links.meet_neighbours(mesh, 5, 3, torch.float64, torch.device("cpu"))
    if links is None:
        return None
    arrived: list[float] = []
    for number in range(MESSAGES):
        message = torch.full((1 + number % 5, 3), 100.0 * number, dtype=torch.float64)
        if links.before is not None:
            links.before.receive(message.fill_(math.nan))
            message += 1
        if links.behind is not None:
            links.behind.send(message)
            # A copy is on its way.
            message.fill_(math.nan)
        elif not message.isnan().any():
            arrived.append(float(message.mean()))
    return arrived


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)])
def test_messages_pass_all_stages_in_order(mesh, ranks, tmp_path):
    arrived = ranks(mesh).call(mesh, pass_on, tmp_path, None)
    expected = [100.0 * number + mesh[1] - 1 for number in range(MESSAGES)]
    assert arrived[-mesh[0] :] == [expected] * mesh[0]
    assert arrived[: -mesh[0]] == [[]] * (mesh[0] * (mesh[1] - 1))


@pytest.mark.parametrize("buffer", [other_memory, no_memory])
def test_links_that_fail_on_one_rank_are_not_used_by_any(buffer, ranks, tmp_path):
    assert ranks((1, 4)).call((1, 4), pass_on, tmp_path, buffer) == [None] * 4


class LocalSums(PeerSums):
    """Sums of which rank 1 gets no memory, or cannot compute any."""

    def __init__(self, mesh: Mesh, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        if mesh.rank == 1 and rows == 1:
            raise RuntimeError("out of memory")
        self._rank, self._columns, self._memory = mesh.rank, columns, torch.empty(rows * columns, dtype=dtype)

    def sum(self, room: torch.Tensor) -> torch.Tensor:
        if self._rank == 1:
            raise RuntimeError("no such operator")
        return room


def meet_sums(mesh: Mesh, rows: int) -> bool:
    with patch.object(torch.cuda, "can_device_access_peer", lambda *_: True):
        sums = LocalSums.meet(mesh, rows, 3, torch.float64, torch.device("cpu"))
    # What is summed next is what all ranks give, not what one of them has left over.
    return sums is None and float(all_reduce(torch.ones(1), mesh)) == mesh.tensor_size


@pytest.mark.parametrize("rows", [1, 5])
def test_sums_that_fail_on_one_rank_are_not_used_by_any(rows, ranks):
    assert ranks((2, 1)).call((2, 1), meet_sums, rows) == [True, True]
