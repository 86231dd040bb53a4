"""The server's event loop, which turns to a few of many sockets at a time, and to each of them in the end."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from tokabatch.serve.server import MOST_EVENTS, BoundedSelector


def test_of_many_sockets_a_few_are_read_at_a_time_and_all_in_turn() -> None:
    with ExitStack() as stack, BoundedSelector() as selector:
        pairs = [tuple(map(stack.enter_context, socket.socketpair())) for _ in range(3 * MOST_EVENTS)]
        for ours, theirs in pairs:
            selector.register(ours, 1)
            theirs.send(b"x")
        # Read or not, each is reported.
        seen = {key.fd for _ in range(3) for key, _ in selector.select(0)}
        assert seen == {ours.fileno() for ours, _ in pairs}
        read: list[int] = []
        while ready := selector.select(0):
            assert len(ready) <= MOST_EVENTS
            for key, _ in ready:
                assert key.fileobj.recv(9) == b"x"  # type: ignore[union-attr]
                read.append(key.fd)
        assert sorted(read) == sorted(ours.fileno() for ours, _ in pairs)
