"""Orders to another process, sent by a thread: whoever gives one never waits for a process that does not read, and so still
sees that it hangs."""

from __future__ import annotations

import os
import queue
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class Outbox:
    """Of a pipe whose ends are sockets. Everything else of the pipe, closing it included, is its owner's."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._queue = queue.SimpleQueue[Any]()
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def put(self, order: Any) -> None:
        """Send this after all before it; None is the last one. Once the process is gone nothing is sent, and its end is seen
        by whoever receives."""
        self._queue.put(order)

    def close(self) -> None:
        """Shut the pipe down in both directions, and with that break off what is being sent: the other end reads what has
        arrived, then the end of the pipe. To be called before the pipe is closed, once or more."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        self._queue.put(None)
        self._thread.join()

    def _send(self) -> None:
        with suppress(OSError):
            while True:
                order = self._queue.get()
                self._pipe.send(order)
                if order is None:
                    return
