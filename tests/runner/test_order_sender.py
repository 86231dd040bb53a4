"""Orders that are sent by a thread: nothing that the other end does blocks the caller."""

from __future__ import annotations

import os
import pickle
import struct
import threading
from multiprocessing import Pipe

import pytest

from tokabatch.runner.order_sender import MessageReader, OrderSender, receive_buffer, send_buffer

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


def test_messages_are_received_in_parts_and_none_is_read_too_far() -> None:
    here, there = Pipe()
    reader = MessageReader(there)
    content = pickle.dumps("a message")
    whole = struct.pack("!i", len(content)) + content
    for byte in whole[:-1]:
        os.write(here.fileno(), bytes([byte]))
        assert reader.receive() is None
    os.write(here.fileno(), whole[-1:] + whole + whole)
    assert [reader.receive(), there.recv(), reader.receive()] == ["a message"] * 3
    assert not there.poll()
    here.close()
    with pytest.raises(EOFError):
        reader.receive()


def test_long_messages_are_received() -> None:
    here, there = Pipe()
    reader, received = MessageReader(there), list[object]()
    content = pickle.dumps(MORE_THAN_FITS)

    def send() -> None:
        here.send(MORE_THAN_FITS)
        # As multiprocessing sends 2 GiB and more.
        os.write(here.fileno(), struct.pack("!iQ", -1, len(content)))
        send_buffer(here, memoryview(content))

    sender = threading.Thread(target=send)
    sender.start()
    while len(received) < 2:
        if there.poll(10.0) and (message := reader.receive()) is not None:
            received.append(message)
    sender.join()
    assert received == [MORE_THAN_FITS] * 2


def test_a_message_that_is_too_long_is_refused() -> None:
    here, there = Pipe()
    here.send_bytes(bytes(33))
    with pytest.raises(OSError):
        MessageReader(there).receive_bytes(most=32)
