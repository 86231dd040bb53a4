"""Heartbeats between a worker process and its parent: each detects the end of the other, the parent also a hang.

The child's thread sends a few counts several times a second through a pipe of its own. The parent's thread reads them and
kills the child where they stop, or do not move. When the parent is gone the child's next sign has no reader, and it exits.
Imports nothing heavy: the signs begin before the child imports what it needs for its work.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

BEAT_SECONDS = 0.25
MAX_TICK_SECONDS = 1.0
"""The most seconds between two checks that count as silence: in a longer gap, the parent itself was suspended (Ctrl-Z)."""
WARMING_STEPS = 16
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_MOST_BYTES = 15
"""The most bytes of a process's name in Linux."""
_LAYOUT = struct.Struct("<qq?")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds without progress after which a worker counts as hung."""

    step: float = 120.0
    """Seconds without finishing a step, while one is queued."""
    warming: float = 1800.0
    """`step` for the first `WARMING_STEPS` steps, in which kernels may be compiled."""
    silence: float = 120.0
    """Seconds without a heartbeat."""
    loading: float = 120.0
    """Seconds without a heartbeat before the worker is ready: loading may hold the interpreter's lock."""

    @classmethod
    def of(cls, seconds: float) -> Patience:
        """Return the limits for a job's `hang_seconds`; those of loading and warming up are at least the defaults."""
        default = cls()
        return cls(seconds, max(seconds, default.warming), seconds, max(seconds, default.loading))


class Pulse:
    """The child's side. The worker's loop keeps the counts; they are sent from a thread of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.begun = 0
        self.finished = 0
        """The number of steps begun and finished; dropped steps count as finished."""
        self.waiting = False
        """Whether the worker is blocked on the parent, which does not read a result."""

    def start(self) -> None:
        """Start sending heartbeats, and end this process as soon as the parent has ended."""
        die_with_parent()
        show_name()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        try:
            while True:
                self._pipe.send_bytes(_LAYOUT.pack(self.begun, self.finished, self.waiting))
                time.sleep(BEAT_SECONDS)
        except OSError:
            # Without cleaning up: the main thread may be blocked in a kernel or a lock.
            os._exit(0)


def die_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends, even if this process is stopped. If the parent process
    has ended before this call, for which the system sends no signal, end this process now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)


def show_name() -> None:
    """Have Linux list this process, in `top` and `ps -o comm`, by the name that multiprocessing gave it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, multiprocessing.current_process().name.encode()[:_MOST_BYTES])


class Vitals:
    """Evaluates the signs. It reads no clock: the caller passes the time that has elapsed."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._begun = self._finished = 0
        self._waiting = False
        self._silent = self._standing = 0.0
        self.ready = False
        """Whether the worker has loaded what it needs."""

    def beat(self, begun: int, finished: int, waiting: bool) -> None:
        """Record a heartbeat."""
        self._silent = 0.0
        if finished != self._finished or waiting or begun == finished:
            self._standing = 0.0
        self._begun, self._finished, self._waiting = begun, finished, waiting

    def pass_time(self, seconds: float) -> None:
        tick = min(seconds, MAX_TICK_SECONDS)
        self._silent += tick
        if self._begun > self._finished and not self._waiting:
            self._standing += tick

    @property
    def fault(self) -> str | None:
        """Why the worker counts as hung; None if it does not."""
        patience = self._patience
        if self._silent > (patience.silence if self.ready else patience.loading):
            return f"it did not respond for {self._silent:.0f} s"
        limit = patience.step if self._finished >= WARMING_STEPS else patience.warming
        if self._standing > limit:
            oldest = self._finished + 1
            # A worker launches ahead, so that the step that hangs is unknown.
            which = f"step {oldest} was" if self._begun == oldest else f"steps {oldest} to {self._begun} were"
            return f"{which} not done after {self._standing:.0f} s"
        return None


class Watch:
    """The parent's side: a thread that calls `kill` when the signs say that the worker hangs."""

    def __init__(self, pipe: Connection, patience: Patience, kill: Callable[[], None]) -> None:
        self._pipe = pipe
        self._vitals = Vitals(patience)
        self._kill = kill
        self._closing = threading.Event()
        self.fault: str | None = None
        """Why the worker was killed; None if it was not."""
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Record that the worker has loaded what it needs."""
        self._vitals.ready = True

    def close(self) -> None:
        """Stop watching. The caller closes the pipe."""
        self._closing.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._closing.is_set():
            try:
                if self._pipe.poll(BEAT_SECONDS):
                    self._vitals.beat(*_LAYOUT.unpack(self._pipe.recv_bytes()))
            except (EOFError, OSError):
                return
            now = time.monotonic()
            self._vitals.pass_time(now - before)
            before = now
            self.fault = self._vitals.fault
            if self.fault is not None:
                self._kill()
                return
