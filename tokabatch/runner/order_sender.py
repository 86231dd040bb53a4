"""Pipes to another process that may hang. Orders are sent by a thread, so that the caller does not block on a process that does
not read and can detect that it hangs; receiving ends where the process stops in the middle of a message. Large buffers
pass as plain bytes."""

from __future__ import annotations

import os
import queue
import socket
import struct
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

STALL_SECONDS = 30
"""The longest pause within a message; a process that is stopped while it sends one would block the receiver without end."""


def limit_stalls(pipe: Connection) -> None:
    """Make `recv` raise BlockingIOError after a pause of STALL_SECONDS within a message; time for which this process is stopped
    itself does not count. The ends of the pipe are sockets."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        # A program that has set a default timeout for sockets would otherwise make this one, and the pipe, non-blocking.
        end.setblocking(True)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", STALL_SECONDS, 0))


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
