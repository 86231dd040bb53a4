"""A process that judges.

It starts with nothing else: its first message, None, says that it runs; the first one it receives is the `JudgeSpec`, its
answer a `Loaded` or the reason why the judge cannot be loaded; then each request is answered by one message per sample,
`packed`, as soon as it is judged. What the judge prints is dropped. A process that the judge forks, and that returns into the
judge's caller, ends there. Limits on memory are the system's, so they hold for libraries, too. This is no sandbox: a judge may
do whatever its user may.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tokabatch.scoring.judge import Judge, JudgeSpec
from tokabatch.scoring.limits import limit_resource

_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the judge's file declares: the Arrow types of its own columns, and whether it takes several texts at once."""

    columns: Mapping[str, str]
    takes_batches: bool


@dataclass(frozen=True, slots=True)
class Request:
    """Texts to judge, each with its row; without texts, rows to check."""

    rows: Sequence[Mapping[str, Any]]
    texts: Sequence[str] | None = None


def packed(answer: object) -> bytes:
    """Return a message to the run: its length, then its pickle."""
    content = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


def unpacked(received: bytearray) -> list[Any]:
    """Iterate over the complete messages in `received`, removing them from its front."""
    answers: list[Any] = []
    begin = 0
    while len(received) >= (content := begin + _LENGTH.size):
        end = content + _LENGTH.unpack_from(received, begin)[0]
        if len(received) < end:
            break
        answers.append(pickle.loads(received[content:end]))
        begin = end
    del received[:begin]
    return answers


def main(descriptor: int) -> None:
    """Answer the requests on the socket until its other end is closed."""
    connection, pid = Connection(descriptor), os.getpid()
    answers = socket.socket(fileno=os.dup(descriptor))
    if sys.platform == "linux":
        # Ends with the process that started this one; whatever a judge starts remains a descendant of this process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"toka-judge")
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    with suppress(EOFError, OSError):
        answers.sendall(packed(None))
        spec: JudgeSpec = connection.recv()
        limit_resource(resource.RLIMIT_AS, spec.memory_bytes)
        limit_resource(resource.RLIMIT_CORE, 0)
        try:
            judge = Judge(spec)
        except ValueError as error:
            answers.sendall(packed(str(error)))
            return
        answers.sendall(packed(Loaded(judge.columns, judge.takes_batches)))
        while True:
            request: Request = connection.recv()
            if request.texts is None:
                for row in request.rows:
                    _answer(answers, pid, judge.check(row))
            elif judge.takes_batches:
                for verdict in judge.verdicts(request.texts, request.rows):
                    _answer(answers, pid, verdict)
            else:
                for text, row in zip(request.texts, request.rows, strict=True):
                    _answer(answers, pid, judge.verdicts([text], [row])[0])
            while _reaped():
                pass


def _answer(answers: socket.socket, pid: int, answer: object) -> None:
    if os.getpid() != pid:
        os._exit(0)
    answers.sendall(packed(answer))


def _reaped() -> bool:
    """Reap an ended child of the judge's; return whether there was one."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False
