"""Processes that prepare samples beside main, which hands them bytes and is handed tables: no Python object is made there of a
sample. Main keeps what it has handed out until it is back as rows of a table, so that nothing is lost with a process, and takes
no sample twice: the samples of a lost one are handed to the one that takes its place.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.errors import EngineError, TokabatchError
from tokabatch.job import Job
from tokabatch.runner.forked import fork, keep_only
from tokabatch.runner.judging import HURRIED_SECONDS, LOOK_SECONDS
from tokabatch.runner.preparation import Preparation
from tokabatch.runner.sample_tables import SampleTables
from tokabatch.runner.waiting_samples import PIECE_BYTES
from tokabatch.scheduling.completion_batch import Completions, PackedCompletions
from tokabatch.scoring.pool import most_judges
from tokabatch.workload.prepare import Workload

REPLICAS_EACH, CORES_EACH = 2, 4
"""A process is there for so many replicas, as long as there are so many cores for each."""
MOST_WAITING = 8192
"""Samples that may be with one process; where there are more, the run waits, and the replicas with it."""
SEND_SECONDS, HURRIED_SEND_SECONDS = 0.2, 0.02
"""How often tables are sent that are not full, and where rows stop by their verdicts, or the run is at its end."""
STOP_SECONDS = 10.0


def num_preparers(job: Job, replicas: int) -> int:
    """How many processes prepare the samples of so many replicas, each with judges of its own if the job has any."""
    count = min(-(-replicas // REPLICAS_EACH), max(1, len(os.sched_getaffinity(0)) // CORES_EACH))
    return count if job.verify is None else min(count, most_judges(job.verify))


@dataclass(frozen=True, slots=True)
class Work:
    """To a process: samples, and the number of each, ascending."""

    numbers: Int64
    completions: PackedCompletions


@dataclass(frozen=True, slots=True)
class Prepared:
    """From a process: rows of the output, as an Arrow stream, and the number of each sample."""

    numbers: Int64
    stream: pa.Buffer


Order = Work | Literal["finish", "hurry"] | None
"""To a process: samples; to `finish`, that is to send at once what is ready; to `hurry`, and not wait for verdicts; to end."""


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
        may be lost in a row without a table."""
        seconds = HURRIED_SEND_SECONDS if hurried else SEND_SECONDS
        self._start = lambda: _Process(job, workload, tables, count, seconds)
        self._count, self._clock, self._tell = count, clock, tell
        self._processes: list[_Process] = []
        self._next = 0
        """The number of the next sample."""
        self._lost, self._max_lost = 0, job.engine.max_restarts
        self._finishing = self._closed = False
        self._deadline = math.inf

    @property
    def num_waiting(self) -> int:
        return sum(process.num_waiting for process in self._processes)

    def add(self, completions: Completions) -> None:
        if not len(completions):
            return
        packed = completions if isinstance(completions, PackedCompletions) else PackedCompletions.of(completions)
        while len(self._processes) < self._count:
            self._processes.append(self._start())
        self._finishing = False
        begin, self._next = self._next, self._next + len(packed)
        work = Work(np.arange(begin, self._next), packed)
        min(self._processes, key=lambda process: process.num_waiting).hand(work)

    def tables(self, received: int, *, everything: bool) -> Iterator[pa.Table]:
        for place, process in enumerate(self._processes):
            while process.has_news:
                try:
                    table = process.receive()
                except _Lost as fault:
                    self._replace(place, fault)
                    break
                self._lost = 0
                yield table

    def keeps_up(self) -> bool:
        if all(process.num_waiting <= MOST_WAITING and process.num_bytes <= PIECE_BYTES for process in self._processes):
            return True
        self._wait()
        return False

    def is_done(self, goes_on: Callable[[], bool]) -> bool:
        if not self.num_waiting:
            return True
        if not self._finishing:
            self._order("finish")
            self._finishing = True
        self._wait()
        now = self._clock()
        if not goes_on() and self._deadline == math.inf:
            self._deadline = now + HURRIED_SECONDS
        if now >= self._deadline + STOP_SECONDS:
            raise EngineError(f"{self.num_waiting:,} finished samples did not come back from the processes that prepare them")
        if now >= self._deadline and not self._closed:
            self._order("hurry")
            self._closed = True
        return False

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def _wait(self) -> None:
        wait([process.pipe for process in self._processes], LOOK_SECONDS)

    def _order(self, order: Literal["finish", "hurry"]) -> None:
        for process in self._processes:
            process.send(order)

    def _replace(self, place: int, fault: _Lost) -> None:
        """Another process takes the place of one that is lost, and its samples. Raises EngineError where that has happened too
        often."""
        process = self._processes[place]
        process.close()
        self._lost += 1
        if self._lost > self._max_lost:
            raise EngineError(f"{fault}; giving up (engine.max_restarts). What is committed is intact.") from fault
        self._tell(f"{fault}. Starting another; its samples are prepared again")
        self._processes[place] = another = self._start()
        for work in process.left():
            another.hand(work)
        if self._finishing:
            another.send("finish")
        if self._closed:
            another.send("hurry")


class _Lost(Exception):
    """A process has ended."""


class _Held:
    """Samples that a process has, and which of them it has not given back."""

    def __init__(self, work: Work) -> None:
        self.work, self.left = work, np.ones(len(work.completions), np.bool_)


class _Process:
    """One process, as main reaches it."""

    def __init__(self, job: Job, workload: Workload, tables: SampleTables, count: int, seconds: float) -> None:
        self.pipe, theirs = Pipe()
        self._process = fork(_main, (theirs, job, workload, tables, count, seconds), "tokabatch-preparer")
        theirs.close()
        self._held = deque[_Held]()
        self.num_waiting = self.num_bytes = 0
        """Samples that it has, and bytes that are kept of them."""

    def hand(self, work: Work) -> None:
        """It has these samples from now on, whatever becomes of them on the way."""
        self._held.append(_Held(work))
        self.num_waiting += len(work.completions)
        self.num_bytes += work.completions.num_bytes
        self.send(work)

    def send(self, order: Order) -> None:
        try:
            self.pipe.send(order)
        except OSError:
            # What it had sent before is read, then its end.
            pass
        except BaseException:
            self._process.kill()
            raise

    @property
    def has_news(self) -> bool:
        try:
            return self.pipe.poll()
        except OSError:
            return True

    def receive(self) -> pa.Table:
        """The table that has come in. Raises _Lost where the process has ended, and the error that it failed with."""
        try:
            message: Prepared | TokabatchError = self.pipe.recv()
            if isinstance(message, TokabatchError):
                raise message
            self._settle(message.numbers)
            return pa.ipc.open_stream(message.stream).read_all()
        except (EOFError, OSError) as error:
            self._process.join(STOP_SECONDS)
            code = self._process.exitcode or 0
            by = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise _Lost(f"a process that prepares samples {by}") from error
        except BaseException:
            # Half a message may be left in the pipe.
            self._process.kill()
            raise

    def _settle(self, numbers: Int64) -> None:
        """The samples of these numbers are back."""
        numbers = np.sort(numbers)
        for held in self._held:
            theirs = held.work.numbers
            begin, end = np.searchsorted(numbers, (theirs[0], theirs[-1] + 1))
            held.left[np.searchsorted(theirs, numbers[begin:end])] = False
        self.num_waiting -= len(numbers)
        while self._held and not self._held[0].left.any():
            self.num_bytes -= self._held.popleft().work.completions.num_bytes

    def left(self) -> Iterator[Work]:
        """What it has not given back."""
        for held in self._held:
            if held.left.any():
                completions = [each for each, left in zip(held.work.completions, held.left, strict=True) if left]
                yield Work(held.work.numbers[held.left], PackedCompletions.of(completions))

    def close(self) -> None:
        """End the process, and with it its judges."""
        with suppress(OSError):
            self.pipe.send(None)
        # A table that it is sending has no reader any more.
        self.pipe.close()
        self._process.join(STOP_SECONDS)
        self._process.kill()
        self._process.join()


def _main(pipe: Connection, job: Job, workload: Workload, tables: SampleTables, count: int, seconds: float) -> None:
    """The forked process."""
    keep_only((pipe.fileno(),))
    try:
        _serve(pipe, Preparation(job, workload, tables, time.monotonic, count), seconds)
    except ConnectionError:
        # Main has closed the pipe.
        pass
    except TokabatchError as error:
        pipe.send(error)
    except Exception as error:
        reason = " ".join(traceback.format_exception_only(error)[-1].split())
        pipe.send(
            EngineError(f"preparing samples failed: {reason}; please report this with the job file\n{traceback.format_exc()}")
        )


def _serve(pipe: Connection, preparation: Preparation, seconds: float) -> None:
    """Send a table of what is ready as soon as it is full, and what there is every so many seconds."""
    inbox = queue.SimpleQueue[Order]()
    threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    sent, due = 0, 0.0
    try:
        while True:
            for order in _orders(inbox, seconds if preparation.num_waiting else None):
                if order is None:
                    return
                if isinstance(order, Work):
                    preparation.add(order.completions, order.numbers)
                elif order == "finish":
                    seconds = HURRIED_SEND_SECONDS
                else:
                    preparation.hurry()
            everything = time.monotonic() >= due
            for table in preparation.tables(sent, everything=everything):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                pipe.send(Prepared(preparation.numbers(table.num_rows), sink.getvalue()))
                sent += table.num_rows
            due = time.monotonic() + seconds if everything else due
    finally:
        preparation.close()


def _orders(inbox: queue.SimpleQueue[Any], seconds: float | None) -> Sequence[Order]:
    """Those that have come; where there are none, the first that comes within so many seconds."""
    orders: list[Order] = []
    with suppress(queue.Empty):
        orders.append(inbox.get(timeout=seconds))
        while True:
            orders.append(inbox.get_nowait())
    return orders


def _listen(pipe: Connection, inbox: queue.SimpleQueue[Order]) -> None:
    """Take in what main sends, so that main never waits for this process to read."""
    order: Order = None
    with suppress(EOFError, OSError):
        while (order := pipe.recv()) is not None:
            inbox.put(order)
    inbox.put(None)
