"""Pipes to another process that may hang. Orders are sent by a thread, so that the caller does not block on a process that does
not read and can detect that it hangs; a message is received in parts if the process stops in the middle of it. Large buffers
pass as plain bytes."""

from __future__ import annotations

import math
import os
import pickle
import queue
import socket
import struct
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tokabatch.number_text import counted

_LENGTH, _LONG_LENGTH, _CONTENT = "!i", "!Q", ""
"""What multiprocessing sends: the length, which is -1 if a longer field with it follows, then the content."""
PAUSE_SECONDS = 0.02
"""The longest pause within a message after which the rest of it is received later."""


class MessageReader:
    """Receives through a pipe whose ends are sockets, and does not block on a process that stops in the middle of a
    message."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._kind: str = _LENGTH
        self._content, self._filled = bytearray(struct.calcsize(_LENGTH)), 0
        """What is being received, and the number of bytes that have arrived."""

    def receive(self) -> Any:
        """Return the next message; None if it has not arrived in full. Call this when the pipe is readable: what has arrived
        behind the message stays there. Raises EOFError or OSError where the pipe ends."""
        content = self.receive_bytes()
        return None if content is None else pickle.loads(content)

    def receive_bytes(self, pause: float = PAUSE_SECONDS, most: float = math.inf) -> bytearray | None:
        """As `receive`, for a message that is not pickled; returns None after a pause of so many seconds. Raises OSError if it
        is longer than `most` bytes."""
        while True:
            while self._filled < len(self._content):
                if not self._pipe.poll(pause):
                    return None
                count = os.readv(self._pipe.fileno(), [memoryview(self._content)[self._filled :]])
                if not count:
                    raise EOFError
                self._filled += count
            kind, content = self._kind, self._content
            self._filled = 0
            if kind == _CONTENT:
                self._kind, self._content = _LENGTH, bytearray(struct.calcsize(_LENGTH))
                return content
            (length,) = struct.unpack(kind, content)
            if length > most:
                raise OSError(f"a message of {counted(length, 'byte')}, where at most {most:,} are due")
            self._kind = _LONG_LENGTH if length < 0 else _CONTENT
            self._content = bytearray(struct.calcsize(_LONG_LENGTH) if length < 0 else length)


def send_buffer(pipe: Connection, buffer: memoryview) -> None:
    """Send a buffer's bytes as they are. A message that says how many follow is sent before: to pickle the bytes with it would
    copy them several times at both ends, which takes ten times as long."""
    while len(buffer):
        buffer = buffer[os.write(pipe.fileno(), buffer) :]


def receive_buffer(pipe: Connection, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of the other end's `send_buffer`. Raises EOFError if the pipe ends before."""
    while len(buffer):
        count = os.readv(pipe.fileno(), [buffer])
        if not count:
            raise EOFError
        buffer = buffer[count:]


class OrderSender:
    """Sends through a pipe whose ends are sockets. The owner of the pipe receives from it and closes it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._queue = queue.SimpleQueue[Any]()
        self._thread = threading.Thread(target=self._send, name="order-sender", daemon=True)
        self._thread.start()

    def put(self, order: Any) -> None:
        """Queue an order; None is the last one. If the process has ended, orders are dropped, and reading the pipe raises
        EOFError."""
        self._queue.put(order)

    def close(self) -> None:
        """Shut the pipe down in both directions, which interrupts a send in progress: the other end reads what has arrived,
        then the end of the pipe. Call it before the pipe is closed; further calls do nothing."""
        self._shut_down()
        self._queue.put(None)
        self._thread.join()

    def _send(self) -> None:
        try:
            order: Any = self
            while order is not None:
                order = self._queue.get()
                self._pipe.send(order)
        except OSError:
            return  # The process has ended.
        except BaseException:
            # Otherwise both processes would go on without orders.
            self._shut_down()
            raise

    def _shut_down(self) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
