"""A process that starts workers without importing torch again: it is forked from main when main has imported torch but not
used it, and forks a worker whenever a member requests one.

A member cannot fork its own worker, because it is a fork of a main that has used CUDA. A worker ends with the process that
requested it: the server kills it then, even if it is stopped or hangs in a kernel.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from tokabatch.engine.executor import WorkerProcess
from tokabatch.runner.forked import can_fork, fork, keep_only

REQUEST_BYTES = 1 << 20
ANSWER_SECONDS = 30.0
"""How long a member waits for its worker to be forked before it spawns one itself."""
GPU_FILES = "/dev/nvidia"


class ForkServer:
    """Main's end of the server, which members forked from main use, too."""

    def __init__(self) -> None:
        """Start the server. torch must not have been used in this process."""
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = fork(_serve, (theirs,), "toka-forks")
        theirs.close()

    @classmethod
    def if_possible(cls) -> ForkServer | None:
        """Return a server; None if this system cannot fork, or if this process has used a GPU already."""
        try:
            return cls() if can_fork() and not _has_used_gpu() else None
        except OSError:
            return None

    def process(
        self, *, target: Callable[..., None], args: tuple[Connection, Connection, bytes], name: str, daemon: bool
    ) -> WorkerProcess:
        """See `Starter`: `target` is called with two pipes and the pickled work. If the server has ended, the process is
        spawned."""
        steps, signs, work = args
        request = pickle.dumps((name, dict(os.environ), target, work))
        try:
            return _Forked(self._requests, request, (steps.fileno(), signs.fileno()))
        except OSError:
            return multiprocessing.get_context("spawn").Process(target=target, args=args, name=name, daemon=daemon)

    def close(self) -> None:
        """End the server, and workers that are left."""
        self._process.kill()
        self._process.join()
        self._requests.close()


class _Forked:
    """See `WorkerProcess`: a child of the server. The control socket brings its process id, then its exit code; the server
    kills it when this end is shut down or closed."""

    def __init__(self, requests: socket.socket, request: bytes, ends: tuple[int, int]) -> None:
        """Raises OSError if the server does not answer, or the request is too large for one message."""
        if len(request) > REQUEST_BYTES:
            raise OSError(errno.EMSGSIZE, "too large for one message")
        self._code: int | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(requests, [request], [*ends, theirs.fileno()])
        self._control.settimeout(ANSWER_SECONDS)
        pid = self._control.recv(64)
        if not pid:
            raise ConnectionError("the fork server has ended")
        self.pid: int | None = int(pid)

    @property
    def exitcode(self) -> int | None:
        if self._code is None and wait([self._control], 0):
            code = b""
            with suppress(OSError):
                code = self._control.recv(64)
            # Without the server its workers are killed, too.
            self._code = int(code) if code else -signal.SIGKILL
        return self._code

    @property
    def sentinel(self) -> int:
        return self._control.fileno()

    def start(self) -> None:
        """It runs already."""

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        if self._code is None:
            wait([self._control], timeout)

    def kill(self) -> None:
        # Not by its number, which may be another process's by now.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)


@dataclass
class _Served:
    """A worker as the server sees it."""

    process: BaseProcess
    control: socket.socket
    killed: bool = False


def _serve(requests: socket.socket) -> None:
    """Run the server until no process is left that holds the other end of `requests`."""
    keep_only({requests.fileno()})
    ended, ending = socket.socketpair()
    ended.setblocking(False)
    ending.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ending.fileno(), warn_on_full_buffer=False)
    workers: list[_Served] = []
    while True:
        ready = wait([requests, ended, *(worker.control for worker in workers if not worker.killed)])
        with suppress(BlockingIOError):
            ended.recv(4096)
        for worker in list(workers):
            if (code := worker.process.exitcode) is not None:
                with suppress(OSError):
                    worker.control.send(str(code).encode())
                worker.control.close()
                workers.remove(worker)
            elif worker.control in ready:
                worker.process.kill()
                worker.killed = True
        if requests in ready:
            request, ends, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 3)
            if not request:
                return
            control = socket.socket(fileno=ends.pop()) if len(ends) == 3 else None
            for end in ends:
                os.set_inheritable(end, False)
            if control is not None:
                others = [requests, ended, ending, *(each.control for each in workers)]
                try:
                    process = fork(_work, (request, ends, [*others, control]), "")
                except OSError as error:
                    # The member spawns its worker.
                    control.close()
                    logging.getLogger(__name__).warning("a worker could not be forked: %s", error)
                else:
                    workers.append(_Served(process, control))
                    with suppress(OSError):
                        control.send(str(process.pid).encode())
            for end in ends:
                os.close(end)


def _work(request: bytes, ends: list[int], servers: list[socket.socket]) -> None:
    """Run a worker, which must not hold the sockets of the server."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in servers:
        each.close()
    name, environment, target, work = pickle.loads(request)
    multiprocessing.current_process().name = name
    os.environ.clear()
    os.environ.update(environment)
    target(*map(Connection, ends), work)


def _has_used_gpu() -> bool:
    """Return whether this process has a GPU's files open: a fork of it cannot use CUDA."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(GPU_FILES):
                return True
    return False
