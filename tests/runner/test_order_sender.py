"""Orders that are sent by a thread: nothing that the other end does blocks the caller."""

from __future__ import annotations

import os
import socket
import threading
from multiprocessing import Pipe

import pytest

from tokabatch.runner.order_sender import OrderSender, limit_stalls, receive_buffer, send_buffer

MORE_THAN_FITS = bytes(1 << 24)
"""More than a socket's buffers hold."""


def test_orders_arrive_in_turn_up_to_the_last() -> None:
    here, there = Pipe()
    sender = OrderSender(here)
    for order in (1, "two", None):
        sender.put(order)
    assert [there.recv() for _ in range(3)] == [1, "two", None]
    sender.close()
    sender.close()


def test_an_end_that_does_not_read_blocks_neither_orders_nor_closing() -> None:
    here, there = Pipe()
    sender = OrderSender(here)
    sender.put(MORE_THAN_FITS)
    sender.put("behind")
    sender.close()
    assert not sender._thread.is_alive()
    with pytest.raises((EOFError, OSError)):
        while True:
            there.recv()


def test_orders_to_an_end_that_is_gone_are_dropped() -> None:
    here, there = Pipe()
    there.close()
    sender = OrderSender(here)
    for _ in range(3):
        sender.put(1)
    sender._thread.join(20)
    assert not sender._thread.is_alive()
    with pytest.raises((EOFError, OSError)):
        here.recv()


def test_an_order_that_cannot_be_sent_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = list[type[BaseException]]()
    monkeypatch.setattr(threading, "excepthook", lambda given: failed.append(given.exc_type))
    here, there = Pipe()
    sender = OrderSender(here)
    sender.put(threading.Lock())
    with pytest.raises(EOFError):
        there.recv()
    with pytest.raises(EOFError):
        here.recv()
    sender.close()
    assert failed == [TypeError]


def test_a_buffer_arrives_behind_its_message_or_the_pipe_ends() -> None:
    here, there = Pipe()
    sent, received = bytes(range(256)) * (1 << 14), bytearray(1 << 22)

    def send() -> None:
        here.send(len(sent))
        send_buffer(here, memoryview(sent))
        here.send("behind")
        send_buffer(here, memoryview(sent)[:100])
        here.close()

    sender = threading.Thread(target=send)
    sender.start()
    assert there.recv() == len(received)
    receive_buffer(there, memoryview(received))
    assert received == sent and there.recv() == "behind"
    with pytest.raises(EOFError):
        receive_buffer(there, memoryview(received))
    sender.join()


def test_a_default_timeout_of_the_program_leaves_the_pipe_blocking() -> None:
    socket.setdefaulttimeout(1.0)
    try:
        here, there = Pipe()
        limit_stalls(there)
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(there.fileno())
    here.close()
    there.close()
