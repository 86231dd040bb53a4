"""A member of a fleet: a replica in a process of its own, so that no step waits for what becomes of finished samples.

The process is forked: the plan's tokens are shared that way, not copied, and what crosses the pipe names prompts by their place
in the plan. Where a `Launch` starts it instead, it may be on another host, and has a copy of the plan. It is given work, and
gives some back, between steps; finished samples come back in their order, sent by a thread whose queue is bounded: where
recording is the slower of the two, the steps are held up instead of memory. It ends with main.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from socket import socket
from typing import Any, Protocol

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.engine.child import PARENTS_SIGNALS
from tokabatch.engine.heartbeat import die_with_parent
from tokabatch.errors import EngineError, ReplicaLost, Stopped, TokabatchError
from tokabatch.job import EngineConfig
from tokabatch.parallel.layout import VISIBLE, Layout
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Ledger, Part, to_give, wants_more
from tokabatch.runner.messages import (
    Cancel,
    Ended,
    Finished,
    Given,
    Lengths,
    Message,
    Order,
    Share,
    Suspects,
    Wants,
    Withdraw,
)
from tokabatch.runner.replica import Replica, Standing
from tokabatch.scheduling.completion_batch import CompletionBatch
from tokabatch.scheduling.contracts import Completion, Requests

MAX_UNSENT = 64
"""Messages that may be on their way to main."""
SAMPLES_SENT = 2048
"""Finished samples in a message at most: main decodes the first of a step while the next ones are on their way."""
STANDING_SECONDS = 0.1
BEAT_SECONDS = 0.5
"""How often the process sends a heartbeat while it has nothing to report."""
STOP_SECONDS = 10.0
_THREADS_OF_TOKENIZERS = "TOKENIZERS_PARALLELISM"


class Build(Protocol):
    """What makes the replica of a member, by its number, for its first requests; `before` is the standing of the replica whose
    place it takes, and whose counts go on."""

    def __call__(
        self, number: int, requests: Requests, before: Standing, *, stop: Interruption, tell: Callable[[str], None]
    ) -> Replica: ...


def can_fork() -> bool:
    """Whether a process of many threads may be forked here; on macOS its system libraries forbid it."""
    return sys.platform == "linux"


class Process(Protocol):
    """The process of a member, as main reaches it. Every method but `receive` and `check` also works where it is gone."""

    @property
    def pipe(self) -> Connection | socket:
        """What is ready to read where `receive` would not wait."""
        ...

    @property
    def pid(self) -> int | None:
        """None on another host."""
        ...

    def receive(self) -> Message | None:
        """The next message; None is a heartbeat. Raises ReplicaLost where the process is gone."""
        ...

    def send(self, order: Order | bytes | None) -> None: ...

    def check(self) -> bool:
        """Whether there is a process already, which gives heartbeats. Raises ReplicaLost where it is gone."""
        ...

    def kill(self) -> None: ...

    def close(self, seconds: float) -> None:
        """End the process, and with it the worker; it has so many seconds for that."""
        ...


class Launch(Protocol):
    """What starts the process of a member elsewhere than by a fork of main: it calls `serve` with these arguments, and with
    `before` and `interval` as they are there."""

    def __call__(self, number: int, build: Build, ledger: Ledger, before: Standing, interval: float | None) -> Process: ...


class Cluster(Protocol):
    """Where the members of a fleet run that are not on this host alone."""

    def layout(self, config: EngineConfig, device: str) -> Layout:
        """How a run is laid out there whose driver is on a `cpu` or sees a GPU, `cuda`. Raises JobError."""
        ...

    def launcher(self, layout: Layout, device: str, model: Path, tell: Callable[[str], None]) -> Launch:
        """What starts the members of a run of this layout; `model` is the folder that each of them reads."""
        ...


class Member:
    """Main's side of one member."""

    def __init__(self, number: int, devices: Sequence[str], standing: Standing) -> None:
        self.number = number
        self.devices = tuple(devices)
        self.standing = standing
        self.placed = False
        """Its process has given a heartbeat."""
        self.begun = False
        """Its model is loaded."""
        self.ended: Ended | None = None
        self.wants: int | None = None
        """How many samples wait there, where more is wanted."""
        self.parts = 0
        """Those sent to this process."""
        self.asked = False
        """It has been asked to give samples back, and has not answered."""
        self.can_give = True
        """As far as its last standing tells; False once it had nothing to give after it."""
        self.finished = 0
        """Samples that came from here, from lost processes of this member included."""
        self.barren = 0
        """Its processes lost in a row without a finished sample."""
        self.given_up = False
        """No other process takes the place of the last one."""
        self.silent = 0.0
        """Seconds since its last heartbeat."""
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def pipe(self) -> Connection | socket | None:
        """None where it has no process."""
        return None if self._process is None else self._process.pipe

    @property
    def before(self) -> Standing:
        """The counts with which its next process goes on."""
        return replace(self.standing, scheduled=replace(self.standing.scheduled, finished=self.finished))

    def begin(self, process: Process) -> None:
        """This is its process from now on."""
        self.placed, self.begun, self.ended, self.wants, self.asked, self.can_give = False, False, None, None, False, True
        self.parts, self.silent, self._process = 0, 0.0, process

    def send(self, order: Order | None) -> None:
        """None is to end. Where the process is gone, the next `receive` says so."""
        if isinstance(order, Part):
            self.parts, self.wants, self.can_give = self.parts + 1, None, True
        elif isinstance(order, Share | Withdraw):
            self.asked = True
        assert self._process is not None
        self._process.send(packed(order) if isinstance(order, Part) else order)

    def receive(self) -> Message | None:
        """The next message, which has come in; None is a heartbeat. Raises ReplicaLost where the process is gone."""
        assert self._process is not None
        message = self._process.receive()
        self.silent, self.placed = 0.0, True
        if isinstance(message, Finished | Ended) and message.standing is not None:
            self.standing, self.can_give = message.standing, True
        if isinstance(message, Ended):
            self.ended = message
        self.begun = self.begun or isinstance(message, Finished | Ended)
        return message

    def wait(self, seconds: float) -> float:
        """So much time has passed without a heartbeat; for how long there has been none. Raises ReplicaLost."""
        assert self._process is not None
        self.silent = self.silent + seconds if self._process.check() else 0.0
        return self.silent

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def close(self) -> None:
        """End the process, and with it the worker."""
        if self._process is None:
            return
        # After its last word the worker may have a trace to write.
        self._process.close(STOP_SECONDS if self.ended is not None else 0.0)
        self._process = None


class Fork:
    """See `Process`: a fork of main. `leave` lets go there of what is main's."""

    def __init__(
        self, member: Member, build: Build, first: Part, ledger: Ledger, interval: float | None, leave: Callable[[], None]
    ) -> None:
        """Start the member's process, on the `first` part."""
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_forked,
            args=(self.pipe, theirs, member, build, first, ledger, interval, leave),
            name=f"tokabatch-replica-{member.number}",
        )
        # Threads of native libraries are not carried over. None of theirs is used in the fork: tokenizers' is kept from it.
        setting = os.environ.get(_THREADS_OF_TOKENIZERS)
        os.environ[_THREADS_OF_TOKENIZERS] = "false"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if setting is None:
                del os.environ[_THREADS_OF_TOKENIZERS]
            else:
                os.environ[_THREADS_OF_TOKENIZERS] = setting
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def receive(self) -> Message | None:
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(STOP_SECONDS)
            code = self._process.exitcode
            by = "ended with code" if code is None or code >= 0 else "was killed by signal"
            raise ReplicaLost(f"the scheduler's process {by} {abs(code or 0)}") from error

    def send(self, order: Order | bytes | None) -> None:
        with suppress(OSError):
            self.pipe.send(order)

    def check(self) -> bool:
        return True

    def kill(self) -> None:
        self._process.kill()

    def close(self, seconds: float) -> None:
        if seconds:
            self._process.join(seconds)
        self.pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def packed(part: Part) -> bytes:
    """A part in few bytes: mostly, prompts that follow one another, of each all samples."""
    table = np.stack((np.diff(part.prompts, prepend=np.int32(0)), part.first, part.stop))
    return zlib.compress(table.astype(np.int32).tobytes(), 1)


def unpacked(text: bytes) -> Part:
    """What `packed` made these bytes of."""
    step, first, stop = np.frombuffer(zlib.decompress(text), np.int32).reshape(3, -1)
    return Part(np.cumsum(step, dtype=np.int32), first, stop)


def _forked(
    mains: Connection,
    pipe: Connection,
    member: Member,
    build: Build,
    first: Part,
    ledger: Ledger,
    interval: float | None,
    leave: Callable[[], None],
) -> None:
    """The forked process."""
    die_with_parent()
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    # A display may have put itself before them, whose locks other threads held.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    # While this one has it open, too, the pipe does not end with main.
    mains.close()
    leave()
    if member.devices:
        os.environ[VISIBLE] = ",".join(member.devices)
    serve(pipe, member.number, build, first, ledger, member.before, interval)


def serve(
    pipe: Connection,
    number: int,
    build: Build,
    first: Part,
    ledger: Ledger,
    before: Standing,
    interval: float | None,
) -> None:
    """What the process of member `number` does until it is told to end, in its main thread: `build` the replica for the `first`
    part of the plan, whose counts go on from `before`, and step. `interval` is the time between two standings that are sent, in
    seconds; None sends the first and the last alone. Where main has closed the pipe the process ends at once."""
    outbox: queue.Queue[Message | None] = queue.Queue(MAX_UNSENT)
    inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    stopped = threading.Event()
    sender = threading.Thread(target=send_messages, args=(outbox, pipe), daemon=True)
    sender.start()
    requests = ledger.plan.part(first.prompts, first.first, first.stop)
    replica = build(number, requests, before, stop=Interruption(stopped.is_set), tell=outbox.put)
    over = threading.Event()
    threading.Thread(target=_listen, args=(pipe, inbox, stopped, replica, over), daemon=True).start()
    loop = _Loop(replica, ledger, inbox, outbox, interval)
    error: TokabatchError | None = None
    try:
        loop.run(stopped)
    except TokabatchError as fault:
        error = fault
    except Stopped:
        pass
    except Exception as fault:
        reason = " ".join(traceback.format_exception_only(fault)[-1].split())
        error = EngineError(f"the scheduler failed: {reason}; please report this with the job file\n{traceback.format_exc()}")
    outbox.put(Ended(replica.standing(), replica.steps(), tuple(loop.idle), error))
    outbox.put(None)
    sender.join()
    over.set()
    replica.close()


class _Loop:
    """Steps, and between them what main has sent."""

    def __init__(
        self,
        replica: Replica,
        ledger: Ledger,
        inbox: queue.SimpleQueue[Order | None],
        outbox: queue.Queue[Message | None],
        interval: float | None,
    ) -> None:
        self.idle: list[tuple[float, float]] = []
        self._replica = replica
        self._ledger = ledger
        self._inbox, self._outbox = inbox, outbox
        self._interval = interval
        self._parts = 0
        self._told: int | None = None
        """Samples that waited when main was told that more is wanted."""
        self._suspects: Int64 = np.zeros(0, np.int64)
        self._due = 0.0

    def run(self, stopped: threading.Event) -> None:
        """Until main says to stop."""
        replica = self._replica
        # The first standing tells that the model is loaded: it is always sent.
        self._tell(replica.start())
        while not stopped.is_set():
            completions: list[Completion] = []
            if replica.scheduler.done:
                self._due = 0.0 if self._interval is not None else self._due
                self._tell([])
                self._want()
                began = time.monotonic()
                order = self._inbox.get()
                self.idle.append((began, time.monotonic()))
                completions += self._obey(order)
            with suppress(queue.Empty):
                while True:
                    completions += self._obey(self._inbox.get_nowait())
            if not replica.scheduler.done and not stopped.is_set():
                completions += replica.step()
                self._want()
            self._tell(completions)

    def _tell(self, completions: list[Completion]) -> None:
        now = time.monotonic()
        while len(completions) > SAMPLES_SENT:
            self._outbox.put(Finished(CompletionBatch(completions[:SAMPLES_SENT]), None))
            completions = completions[SAMPLES_SENT:]
        if now >= self._due:
            standing = self._replica.standing(foresee=self._interval is not None)
            self._outbox.put(Finished(CompletionBatch(completions), standing))
            self._due = float("inf") if self._interval is None else now + max(self._interval, STANDING_SECONDS)
        elif completions:
            self._outbox.put(Finished(CompletionBatch(completions), None))
        suspects = self._replica.scheduler.suspected_rows()
        if not np.array_equal(suspects, self._suspects):
            self._outbox.put(Suspects(suspects))
        self._suspects = suspects

    def _want(self) -> None:
        """Say where few samples wait, and again when they are half as many."""
        waiting = self._replica.waiting
        few = wants_more(waiting, self._replica.scheduler.num_running)
        if few and (self._told is None or (waiting < self._told and waiting <= self._told // 2)):
            self._outbox.put(Wants(waiting, self._parts))
            self._told = waiting

    def _obey(self, order: Any) -> list[Completion]:
        replica, ledger = self._replica, self._ledger
        if isinstance(order, bytes):
            part = unpacked(order)
            self._parts, self._told = self._parts + 1, None
            return replica.extend(ledger.plan.part(part.prompts, part.first, part.stop))
        if isinstance(order, Share):
            waiting = replica.waiting
            given = replica.give_back(to_give(replica.scheduler.num_running + waiting, waiting, order.held))
            self._outbox.put(Given(Part.joined([ledger.part(requests) for requests in given])))
        elif isinstance(order, Withdraw):
            pieces: list[Part] = []
            for row, prompt in zip(order.rows.tolist(), ledger.prompts(order.rows).tolist(), strict=True):
                samples = replica.withdraw(row)
                pieces.append(Part(np.full(len(samples), prompt, np.int32), samples, samples + 1))
            self._outbox.put(Given(Part.joined(pieces)))
        elif isinstance(order, Cancel):
            for row, first in zip(order.rows.tolist(), order.first.tolist(), strict=True):
                replica.withdraw(row, first)
        elif isinstance(order, Lengths):
            replica.scheduler.learn(order.length, order.stopped)
        return []


def send_messages(outbox: queue.Queue[Any], pipe: Connection) -> None:
    """Send what is put into the queue, until None is; in between a None as a heartbeat. Once main has closed the pipe, nothing
    is sent any more: what follows from that is up to the thread that receives."""
    while True:
        beat = False
        try:
            message = outbox.get(timeout=BEAT_SECONDS)
        except queue.Empty:
            message, beat = None, True
        if message is None and not beat:
            return
        with suppress(OSError):
            pipe.send(message)


def _listen(
    pipe: Connection, inbox: queue.SimpleQueue[Any], stopped: threading.Event, replica: Replica, over: threading.Event
) -> None:
    """Hand on what main sends; None means to stop. Where main closes the pipe before all is `over`, the worker and this process
    end, whatever they stand at."""
    with suppress(EOFError, OSError):
        while True:
            order = pipe.recv()
            if order is None:
                stopped.set()
            inbox.put(order)
    if not over.is_set():
        replica.close()
        os._exit(1)
