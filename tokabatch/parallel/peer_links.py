"""Hidden states from one pipeline stage to the next through memory that the next one's GPU reads (torch's symmetric memory).

The sender writes a message into a slot of its own memory and sets a signal in the receiver's; the receiver copies the message
and sets a signal back, after which the slot may be written again. All of this is ordered by the stream that computes. NCCL
keeps a kernel running from the moment one side is ready until the other is, and it takes multiprocessors from the products of
the step that is computed meanwhile.

Peer access is all that is needed. torch calls these operators alpha: `meet_neighbours` tests them when a worker starts, and
NCCL carries the messages where they fail.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from tokabatch.parallel.collectives import SENDING, least
from tokabatch.parallel.mesh import Mesh
from tokabatch.parallel.peer_memory import all_reach

TRIED_ROWS = 300


class Signals(Protocol):
    """The part of torch's symmetric memory that a link uses: one flag for each channel and direction, which a kernel of the
    current stream sets once it is clear, or clears once it is set."""

    def put_signal(self, dst_rank: int, channel: int) -> None: ...

    def wait_signal(self, src_rank: int, channel: int) -> None: ...


class PeerLink:
    """One direction between two neighbours. Messages arrive in their order."""

    def __init__(self, signals: Signals, peer: int, slots: Sequence[torch.Tensor]) -> None:
        """`peer` is the other one's rank. `slots` are the sender's memory as this rank reaches it, each [rows, columns]; a
        message has no more rows."""
        self._signals = signals
        self._peer = peer
        self._slots = slots
        self._count = 0

    def send(self, hidden_TE: torch.Tensor) -> None:
        """Copy the message, whose memory later work of the stream may write to. The stream waits only if all slots hold
        messages that have not been received."""
        slot = self._count % len(self._slots)
        if self._count >= len(self._slots):
            self._signals.wait_signal(self._peer, len(self._slots) + slot)
        self._slots[slot][: len(hidden_TE)].copy_(hidden_TE)
        self._signals.put_signal(self._peer, slot)
        self._count += 1

    def receive(self, room_TE: torch.Tensor) -> torch.Tensor:
        """Fill `room_TE`, which has the shape of the message, and return it. The stream waits for the message."""
        slot = self._count % len(self._slots)
        self._signals.wait_signal(self._peer, slot)
        room_TE.copy_(self._slots[slot][: len(room_TE)])
        self._signals.put_signal(self._peer, len(self._slots) + slot)
        self._count += 1
        return room_TE


@dataclass(frozen=True, slots=True)
class PeerLinks:
    """A rank's links with the previous and the next stage; None on the first and on the last one."""

    before: PeerLink | None
    behind: PeerLink | None
    memory: torch.Tensor
    """What this rank sends from, and its signals behind it: kept as long as the links."""


def meet_neighbours(mesh: Mesh, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> PeerLinks | None:
    """Return links for messages of up to `rows` rows; None if ranks cannot reach each other's memory, or if a message does not
    arrive as it was sent. Every rank of the worker must call it, before any of them uses symmetric memory otherwise."""
    if not all_reach(range(mesh.tensor_size * mesh.pipeline_size)):
        return None
    links, shape = None, (SENDING, rows, columns)
    try:
        group = dist.group.WORLD
        assert group is not None
        memory = symmetric_memory.empty(shape, dtype=dtype, device=device)
        # All ranks at once: torch numbers these meetings within a process, and pairs that have met others before do not find
        # each other.
        handle = symmetric_memory.rendezvous(memory, group.group_name)
        previous, following = mesh.rank - mesh.tensor_size, mesh.rank + mesh.tensor_size
        before = None if mesh.is_first_stage else PeerLink(handle, previous, handle.get_buffer(previous, shape, dtype).unbind())
        behind = None if mesh.is_last_stage else PeerLink(handle, following, memory.unbind())
        links = PeerLinks(before, behind, memory)
    except (RuntimeError, AttributeError) as error:
        logging.getLogger(__name__).warning("stages cannot exchange hidden states by symmetric memory, NCCL is used: %s", error)
    # Agreed on before the first message: without its neighbour's link a rank would wait for ever.
    if not least(links is not None, mesh, device) or links is None:
        return None
    works = True
    try:
        # More messages than slots, so that each slot is reused.
        for number in range(1, 2 * SENDING + 2):
            message = torch.full((min(rows, TRIED_ROWS + number), columns), number, dtype=dtype, device=device)
            if links.before is not None:
                works = torch.equal(links.before.receive(torch.zeros_like(message)), message) and works
            if links.behind is not None:
                links.behind.send(message)
    except (RuntimeError, AttributeError) as error:
        logging.getLogger(__name__).warning("messages by symmetric memory fail: %s", error)
        works = False
    if not least(works, mesh, device):
        logging.getLogger(__name__).warning("hidden states arrive wrong by symmetric memory, NCCL is used")
        return None
    return links
