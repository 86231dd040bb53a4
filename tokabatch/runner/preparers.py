"""Processes that turn finished samples into tables. Main sends them packed samples and receives tables, and so creates no
Python object for a sample. Main keeps each sample until it has come back as a row of a table, and accepts no sample twice: if a
process is lost, its remaining samples are sent to its replacement.

Main never blocks on these processes: threads send and receive. A process that hangs is killed. If one fails, the samples
of the others are recorded before the error is raised.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.cores import usable_cores
from tokabatch.errors import EngineError, TokabatchError
from tokabatch.job import Job
from tokabatch.runner.forked import end, fork, how_it_ended
from tokabatch.runner.judging import HURRIED_SECONDS, LOOK_SECONDS
from tokabatch.runner.order_sender import OrderSender, receive_buffer
from tokabatch.runner.preparation import Preparation
from tokabatch.runner.preparer_process import HURRIED_SEND_SECONDS, SEND_SECONDS, Message, Order, Prepared, Work, prepare
from tokabatch.runner.sample_tables import SampleTables
from tokabatch.runner.waiting_samples import PIECE_BYTES
from tokabatch.scheduling.completion_batch import Completions, PackedCompletions
from tokabatch.scoring.pool import most_judges
from tokabatch.workload.prepare import Workload

CORES_EACH = 4
"""CPU cores for each process. One process prepares some 15,000 judged samples of 50 tokens a second, a little more than an H200
draws of a model of 135M parameters."""
MOST_WAITING = 8192
"""The most samples that one process may hold; above that the run, and with it the replicas, pauses."""
STOP_SECONDS = 10.0
MAX_TICK_SECONDS = 1.0
"""The most seconds between two checks that count as silence of a process: in a longer gap, main itself was suspended."""


def num_preparers(job: Job, replicas: int) -> int:
    """Return the number of processes for this many replicas: one for each, where there are cores enough. Each has judges of
    its own if the job has any."""
    count = min(replicas, max(1, usable_cores() // CORES_EACH))
    return count if job.verify is None else min(count, most_judges(job.verify))


class Preparers:
    """See `Preparing`: by processes of their own, which are started when the first replica reports."""

    def __init__(
        self,
        job: Job,
        workload: Workload,
        tables: SampleTables,
        count: int,
        tell: Callable[[str], None],
        *,
        hurried: bool,
    ) -> None:
        """Start no process yet; there will be `count`. With `hurried`, tables are sent at short intervals. The limits are those
        of replicas: engine.max_restarts processes may be lost in a row without a table, and a process may be silent for
        engine.hang_seconds."""
        seconds = HURRIED_SEND_SECONDS if hurried else SEND_SECONDS
        self._make = lambda place: Preparation(job, workload, tables, (place, count))
        self._seconds, self._count, self._tell = seconds, count, tell
        self._news = threading.Event()
        """Set when a message from a process has arrived."""
        self._processes: list[_Process] = []
        self._leaving: list[_Process] = []
        """Those that have been told to end, as nothing is left for them to do."""
        self._next = 0
        """The number of the next sample."""
        self._lost, self._max_lost = 0, job.engine.max_restarts
        self._max_silence = job.engine.hang_seconds
        self._looked = time.monotonic()
        self._finishing = self._hurries = False
        self._deadline = math.inf
        self._error: TokabatchError | None = None

    @property
    def num_waiting(self) -> int:
        return sum(process.num_waiting for process in self._processes)

    def add(self, completions: Completions) -> None:
        """See `Preparing`. Raises the error of a process that was given up, after the samples have been handed to another."""
        while len(self._processes) < self._count and self._error is None:
            self._processes.append(self._start(len(self._processes)))
        if not len(completions):
            return
        packed = completions if isinstance(completions, PackedCompletions) else PackedCompletions.of(completions)
        self._finishing = False
        begin, self._next = self._next, self._next + len(packed)
        work = Work(np.arange(begin, self._next), packed)
        if self._processes:
            min(self._processes, key=lambda process: process.num_waiting).hand(work)
        self.check()

    def tables(self, received: int, *, everything: bool) -> Iterator[pa.Table]:
        self._news.clear()
        for process in self._processes:
            process.settle(received)
        # Limited, as main itself may have been suspended.
        passed, self._looked = min(time.monotonic() - self._looked, MAX_TICK_SECONDS), time.monotonic()
        for process in list(self._processes):
            try:
                process.watch(passed, self._max_silence)
                while (prepared := process.next(received)) is not None:
                    yield pa.ipc.open_stream(prepared.stream).read_all()
                    received += len(prepared.numbers)
                    process.settle(received)
                    self._lost = 0
            except _Lost as fault:
                self._replace(process, fault)
            except TokabatchError as error:
                self._give_up(process, error)

    def keeps_up(self) -> bool:
        if all(process.num_waiting <= MOST_WAITING and process.num_bytes <= PIECE_BYTES for process in self._processes):
            return True
        self._news.wait(LOOK_SECONDS)
        return False

    def is_done(self, goes_on: Callable[[], bool]) -> bool:
        if not any(process.holds_samples for process in self._processes):
            # They end while main writes what they have prepared.
            self._leaving, self._processes = [*self._leaving, *self._processes], []
            for process in self._leaving:
                process.send(None)
            return True
        if not self._finishing:
            self._order("finish")
            self._finishing = True
        self._news.wait(LOOK_SECONDS)
        now = time.monotonic()
        if not goes_on() and self._deadline == math.inf:
            self._deadline = now + HURRIED_SECONDS
        if now >= self._deadline and not self._hurries:
            self._order("hurry")
            self._hurries = True
        if now >= self._deadline + STOP_SECONDS:
            for process in [process for process in self._processes if process.num_waiting]:
                self._give_up(process, EngineError("finished samples did not come back from the process that prepares them"))
        return False

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        for process in self._processes:
            process.send(None)
        for process in (*self._leaving, *self._processes):
            process.close()

    def _start(self, place: int) -> _Process:
        try:
            return _Process(self._make(place), place, self._seconds, self._news)
        except OSError as error:
            raise EngineError(f"no process can be started to prepare samples: {error.strerror or error}") from error

    def _order(self, order: Literal["finish", "hurry"]) -> None:
        for process in self._processes:
            process.send(order)

    def _replace(self, lost: _Process, fault: _Lost) -> None:
        """Start a process in place of a lost one and send it the samples that are not back yet; give up after too many
        losses."""
        self._lost += 1
        if self._lost > self._max_lost:
            self._give_up(lost, EngineError(f"{fault}; giving up (engine.max_restarts). What is finished is committed."))
            return
        self._tell(f"warning: {fault}. Starting another; its samples are prepared again")
        lost.close()
        try:
            another = self._start(lost.place)
        except EngineError as error:
            self._give_up(lost, error)
            return
        for work in lost.left():
            another.hand(work)
        if self._finishing:
            another.send("finish")
        if self._hurries:
            another.send("hurry")
        self._processes[self._processes.index(lost)] = another

    def _give_up(self, process: _Process, error: TokabatchError) -> None:
        """Drop a process; `check` raises the error. Its samples are not recorded, so that the next start computes them
        again."""
        self._error = self._error or error
        self._processes.remove(process)
        process.close()


class _Lost(Exception):
    """A process has ended or was killed."""


class _Held:
    """Samples that were sent to a process, with a flag for each that has not come back."""

    def __init__(self, work: Work) -> None:
        self.work, self.left = work, np.ones(len(work.completions), np.bool_)


class _Process:
    """Main's end of one process; `place` is its number, which its replacement inherits."""

    def __init__(self, preparation: Preparation, place: int, seconds: float, news: threading.Event) -> None:
        self.place = place
        self._pipe, theirs = Pipe()
        self._process = fork(prepare, (theirs, preparation, seconds), f"toka-preparer-{place}")
        theirs.close()
        self._sender = OrderSender(self._pipe)
        self._inbox = deque[Message | _Lost]()
        self._silent = 0.0
        """Seconds without a message while it holds samples."""
        self._held: list[_Held] = []
        self.num_waiting = self.num_bytes = 0
        """The samples that have not come back, and the bytes that are kept for it."""
        self._receiver = threading.Thread(target=_receive, args=(self._pipe, self._inbox, news), daemon=True)
        self._receiver.start()

    @property
    def holds_samples(self) -> bool:
        return bool(self._held)

    def hand(self, work: Work) -> None:
        """Send samples, which are kept until they come back."""
        # Counted first, so that an exception in between leaves no held sample uncounted.
        self.num_waiting += len(work.completions)
        self.num_bytes += work.completions.num_bytes
        self._held.append(_Held(work))
        self.send(work)

    def send(self, order: Order) -> None:
        self._sender.put(order)

    def watch(self, passed: float, most: float) -> None:
        """Add the `passed` seconds to its silence. If that exceeds `most` seconds, kill the process and raise _Lost."""
        self._silent = self._silent + passed if self._held and not self._inbox else 0.0
        if self._silent > most:
            self._process.kill()
            raise _Lost(f"a process that prepares samples did not respond for {self._silent:.0f} s and was killed")

    def next(self, received: int) -> Prepared | None:
        """Return the next table that has arrived, or None. `received` is the number of samples that main has received before
        it; the table is kept until `settle` is called with a number that includes it. Raises _Lost if the process has ended, or
        the error that it reported."""
        while self._inbox:
            message = self._inbox[0]
            if isinstance(message, Prepared):
                message.until = received + len(message.numbers)
                return message
            if isinstance(message, _Lost):
                raise _Lost(f"a process that prepares samples {how_it_ended(self._process)}")
            if message is not None:
                raise message
            self._inbox.popleft()
        return None

    def settle(self, received: int) -> None:
        """Drop the table that `next` returned last if it is among the `received` samples that main has taken."""
        message = self._inbox[0] if self._inbox else None
        if not isinstance(message, Prepared) or message.until is None:
            return
        if message.until > received:
            message.until = None
            return
        self._let_go(message.numbers)
        self._inbox.popleft()

    def _let_go(self, numbers: Int64) -> None:
        """Record that the samples of these numbers have come back."""
        numbers = np.sort(numbers)
        for held in self._held:
            theirs = held.work.numbers
            begin, end = np.searchsorted(numbers, (theirs[0], theirs[-1] + 1))
            held.left[np.searchsorted(theirs, numbers[begin:end])] = False
        self._held = [held for held in self._held if held.left.any()]
        # Not at each look at them: hundreds of messages may be held.
        self.num_waiting = sum(int(np.count_nonzero(held.left)) for held in self._held)
        self.num_bytes = sum(held.work.completions.num_bytes for held in self._held)

    def left(self) -> Iterator[Work]:
        """Yield the samples that have not come back."""
        for held in self._held:
            completions = [each for each, left in zip(held.work.completions, held.left, strict=True) if left]
            yield Work(held.work.numbers[held.left], PackedCompletions.of(completions))

    def close(self) -> None:
        """Stop the process and its judges."""
        self.send(None)
        end(self._process, 0 if self._silent > MAX_TICK_SECONDS else STOP_SECONDS)
        self._sender.close()
        self._receiver.join()
        self._pipe.close()


def _receive(pipe: Connection, inbox: deque[Message | _Lost], news: threading.Event) -> None:
    """Receive the messages of the process until it ends."""
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, Prepared):
                stream = message.stream = pa.allocate_buffer(message.num_bytes)
                receive_buffer(pipe, memoryview(stream))
            inbox.append(message)
            news.set()
    except (EOFError, OSError):
        inbox.append(_Lost())
    except Exception as error:
        inbox.append(EngineError(f"a message of a process that prepares samples cannot be read: {error}"))
    news.set()
