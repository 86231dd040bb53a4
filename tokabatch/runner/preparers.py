"""Processes that turn finished samples into tables beside main, which sends them bytes and receives tables, and so makes no
Python object for a sample. Main keeps each sample until it is back as a row of a table, so that none is lost with a process,
and accepts none twice: the samples of a lost process are sent to its replacement.

No call of main blocks on these processes: threads send and receive. A process that hangs is killed. If one fails, the samples
of the others are recorded before the error is raised.
"""

from __future__ import annotations

import math
import os
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
from tokabatch.errors import EngineError, TokabatchError
from tokabatch.job import Job
from tokabatch.runner.forked import end, fork, how_it_ended
from tokabatch.runner.judging import HURRIED_SECONDS, LOOK_SECONDS
from tokabatch.runner.outbox import Outbox
from tokabatch.runner.preparation import Preparation
from tokabatch.runner.preparer_process import HURRIED_SEND_SECONDS, SEND_SECONDS, Message, Order, Prepared, Work, prepare
from tokabatch.runner.sample_tables import SampleTables
from tokabatch.runner.waiting_samples import PIECE_BYTES
from tokabatch.scheduling.completion_batch import Completions, PackedCompletions
from tokabatch.scoring.pool import most_judges
from tokabatch.workload.prepare import Workload

REPLICAS_EACH, CORES_EACH = 2, 4
"""Replicas that share one process, and the cores that each process needs."""
MOST_WAITING = 8192
"""Samples that may be with one process; beyond that the run pauses, and the replicas with it."""
STOP_SECONDS = 10.0
MAX_TICK_SECONDS = 1.0
"""The most that a silence grows between two checks: in longer gaps main itself was stopped."""


def num_preparers(job: Job, replicas: int) -> int:
    """Return the number of processes for this many replicas; each has judges of its own if the job has any."""
    count = min(-(-replicas // REPLICAS_EACH), max(1, len(os.sched_getaffinity(0)) // CORES_EACH))
    return count if job.verify is None else min(count, most_judges(job.verify))


class Preparers:
    """See `Preparing`: in processes of their own, which begin with the first samples."""

    def __init__(
        self,
        job: Job,
        workload: Workload,
        tables: SampleTables,
        count: int,
        clock: Callable[[], float],
        tell: Callable[[str], None],
        *,
        hurried: bool,
    ) -> None:
        """Tables are sent at short intervals where that is `hurried`. So many processes as the job allows a replica to lose
        may be lost in a row without a table, and one may be silent for as long as a replica."""
        seconds = HURRIED_SEND_SECONDS if hurried else SEND_SECONDS
        self._make = lambda place: Preparation(job, workload, tables, time.monotonic, (place, count))
        self._seconds, self._count, self._clock, self._tell = seconds, count, clock, tell
        self._news = threading.Event()
        """Something has come from a process since the last look."""
        self._processes: list[_Process] = []
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
        """Raises the error by which a process was given up, once another has the samples."""
        if not len(completions):
            return
        packed = completions if isinstance(completions, PackedCompletions) else PackedCompletions.of(completions)
        while len(self._processes) < self._count and self._error is None:
            self._processes.append(self._start(len(self._processes)))
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
        # Not more than that: main may have been the one that was stopped.
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
        if not self.num_waiting:
            return True
        if not self._finishing:
            self._order("finish")
            self._finishing = True
        self._news.wait(LOOK_SECONDS)
        now = self._clock()
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
        """Another process takes the place of one that is lost, and its samples."""
        self._lost += 1
        if self._lost > self._max_lost:
            self._give_up(lost, EngineError(f"{fault}; giving up (engine.max_restarts). What is finished is committed."))
            return
        self._tell(f"{fault}. Starting another; its samples are prepared again")
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
        """Do without a process, whose samples are computed again by another run; `check` says why."""
        self._error = self._error or error
        self._processes.remove(process)
        process.close()


class _Lost(Exception):
    """A process has ended, or was killed."""


class _Held:
    """Samples that a process has, and which of them it has not given back."""

    def __init__(self, work: Work) -> None:
        self.work, self.left = work, np.ones(len(work.completions), np.bool_)


class _Process:
    """One process, as main reaches it; the one of this `place`."""

    def __init__(self, preparation: Preparation, place: int, seconds: float, news: threading.Event) -> None:
        self.place = place
        self._pipe, theirs = Pipe()
        self._process = fork(prepare, (theirs, preparation, seconds), f"tokabatch-preparer-{place}")
        theirs.close()
        self._outbox = Outbox(self._pipe)
        self._inbox = deque[Message | _Lost]()
        self._silent = 0.0
        """Seconds without a message, while it has samples."""
        self._held: list[_Held] = []
        self._receiver = threading.Thread(target=_receive, args=(self._pipe, self._inbox, news), daemon=True)
        self._receiver.start()

    @property
    def num_waiting(self) -> int:
        """Samples that it has."""
        return sum(int(np.count_nonzero(held.left)) for held in self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept of them."""
        return sum(held.work.completions.num_bytes for held in self._held)

    def hand(self, work: Work) -> None:
        """It has these samples from now on, whatever becomes of them on the way."""
        self._held.append(_Held(work))
        self.send(work)

    def send(self, order: Order) -> None:
        self._outbox.put(order)

    def watch(self, passed: float, most: float) -> None:
        """So many seconds have passed. Raises _Lost where the process has been silent for `most`, and kills it."""
        self._silent = self._silent + passed if self._held and not self._inbox else 0.0
        if self._silent > most:
            self._process.kill()
            raise _Lost(f"a process that prepares samples did not respond for {self._silent:.0f} s and was killed")

    def next(self, received: int) -> Prepared | None:
        """What has come in, which main will have `received` samples with; it is there until `settle` hears of that many. Raises
        _Lost where the process has ended, and the error that it failed with."""
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
        """Main has received so many samples: whether the last ones were those that had come in from here."""
        message = self._inbox[0] if self._inbox else None
        if not isinstance(message, Prepared) or message.until is None:
            return
        if message.until > received:
            message.until = None
            return
        self._let_go(message.numbers)
        self._inbox.popleft()

    def _let_go(self, numbers: Int64) -> None:
        """The samples of these numbers are back."""
        numbers = np.sort(numbers)
        for held in self._held:
            theirs = held.work.numbers
            begin, end = np.searchsorted(numbers, (theirs[0], theirs[-1] + 1))
            held.left[np.searchsorted(theirs, numbers[begin:end])] = False
        self._held = [held for held in self._held if held.left.any()]

    def left(self) -> Iterator[Work]:
        """What it has not given back."""
        for held in self._held:
            completions = [each for each, left in zip(held.work.completions, held.left, strict=True) if left]
            yield Work(held.work.numbers[held.left], PackedCompletions.of(completions))

    def close(self) -> None:
        """End the process, and with it its judges."""
        self.send(None)
        end(self._process, 0 if self._silent > MAX_TICK_SECONDS else STOP_SECONDS)
        self._outbox.close()
        self._receiver.join()
        self._pipe.close()


def _receive(pipe: Connection, inbox: deque[Message | _Lost], news: threading.Event) -> None:
    """Take in what the process sends, to its end."""
    try:
        while True:
            inbox.append(pipe.recv())
            news.set()
    except (EOFError, OSError):
        inbox.append(_Lost())
    except Exception as error:
        inbox.append(EngineError(f"what a process that prepares samples sent cannot be read: {error}"))
    news.set()
