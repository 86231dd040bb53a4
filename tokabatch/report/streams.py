"""Standard output and standard error that cannot break what writes to them: text that they do not take is dropped.

Every write of this process passes through here, those of other libraries included, so a closed descriptor, a full disk, a
reader that ended or a terminal that went away costs the text alone. Who must know what was lost calls `first_fault`.
Imports nothing heavy, as the worker process begins with it.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

STALL_SECONDS = 1.0
"""How long a reader of standard error that does not read is waited for; after that its text is dropped."""
_ERRORS = "tokabatch.escape"


class TolerantFile(io.RawIOBase):
    """An open descriptor whose writes never fail. It is not closed with this object."""

    def __init__(self, descriptor: int, fault: OSError | None = None, stall_seconds: float | None = None) -> None:
        """`fault` is what is wrong with it from the start. Without `stall_seconds` a write takes as long as the reader."""
        self._descriptor = descriptor
        self._stall_seconds = stall_seconds
        self._stalled = False
        self.fault = fault
        """Why text was dropped the first time; None where none was."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: Any, /) -> int:
        """Always as many bytes as were given."""
        view = memoryview(content).cast("B")
        try:
            taken = 0
            while taken < len(view):
                self._wait()
                taken += self._put(view[taken : taken + select.PIPE_BUF])
        except OSError as error:
            self.fault = self.fault or error
        return len(view)

    def _put(self, content: memoryview) -> int:
        try:
            return os.write(self._descriptor, content)
        except BlockingIOError:
            # Another program has made the descriptor non-blocking, and took the room since `_wait`.
            return 0

    def _wait(self) -> None:
        """Until it takes PIPE_BUF bytes without blocking, or fails. Raises TimeoutError where the reader stands still."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        seconds = 0 if self._stalled else self._stall_seconds
        self._stalled = not poll.poll(None if seconds is None else int(1000 * seconds))
        if self._stalled:
            raise TimeoutError(errno.ETIMEDOUT, "its reader has stopped reading")


def make_tolerant() -> None:
    """Let `sys.stdout` and `sys.stderr` write through a `TolerantFile` each, but not where a program has put its own in their
    place. Standard descriptors that are closed are opened on the null device: the next file opened would take their number."""
    closed: list[int] = []
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.append(descriptor)
    for descriptor in closed:
        assert os.open(os.devnull, os.O_RDWR) == descriptor
        os.set_inheritable(descriptor, True)
    codecs.register_error(_ERRORS, _escaped)
    faults = {descriptor: OSError(errno.EBADF, "it is closed") for descriptor in closed}
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(TolerantFile(1, faults.get(1)), sys.__stdout__)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(TolerantFile(2, faults.get(2), STALL_SECONDS), sys.__stderr__, line_buffering=True)


def first_fault(stream: TextIO) -> OSError | None:
    """Why text written to the stream was dropped; None where all of it was taken, or the stream raises such errors itself."""
    stream.flush()
    file = getattr(getattr(stream, "buffer", None), "raw", None)
    return file.fault if isinstance(file, TolerantFile) else None


def _text(file: TolerantFile, before: TextIO | None, line_buffering: bool = False) -> TextIO:
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors=_ERRORS, line_buffering=line_buffering or file.isatty())


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file name that is no text as they are, so that a command with it can be pasted; any other character that
    the encoding does not have as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)
