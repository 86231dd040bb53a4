"""The process that decides steps: a replica whose work comes while it runs, apart from HTTP.

Main sends prompts and cancels rows; finished samples come in batches, what streams wait for a few times a second. The model is
in another process again (`ProcessExecutor`), which is replaced where it is lost. The process ends with main.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from tokabatch.engine.child import PARENTS_SIGNALS
from tokabatch.engine.executor import Executor
from tokabatch.engine.heartbeat import die_with_parent, show_name
from tokabatch.errors import EngineError, Stopped, TokabatchError
from tokabatch.report.streams import make_tolerant
from tokabatch.runner.forked import end, how_it_ended
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.member_process import BEAT_SECONDS, Alive, send_messages
from tokabatch.runner.order_sender import MessageReader
from tokabatch.runner.replica import Replica, Standing
from tokabatch.scheduling.completion_batch import CompletionBatch
from tokabatch.scheduling.contracts import Completion, Requests
from tokabatch.scheduling.generated import Generated
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

PROGRESS_SECONDS = 0.02
"""How often, in seconds, streamed samples are reported."""
STANDING_SECONDS = 0.5
MAX_UNSENT = 64
"""Messages on their way to main: where it takes them more slowly, steps wait."""
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What the process is made of; picklable."""

    nothing: Requests
    """No prompt; its parameters are those of the longest samples to expect."""
    limits: SchedulerLimits
    stops: StopRules
    make: Callable[[], Executor]
    depth: int
    depth_of_few: int | None
    max_restarts: int
    hang_seconds: float
    """A process without a heartbeat for this long is killed: it is stopped, or its loop hangs. A hanging step is the worker's,
    which the process itself watches."""


@dataclass(frozen=True, slots=True)
class Add:
    """To the process: prompts, in their order, and the rows among them whose tokens are streamed."""

    requests: Requests
    streamed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the process: nobody waits for these rows any more."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """From the process: finished samples, and errors."""

    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Progress:
    """From the process: what samples under way have produced since the last time, each with its row and number, and how many
    tokens it had before."""

    samples: list[tuple[int, int, int, Generated]]


@dataclass(frozen=True, slots=True)
class Told:
    """From the process: a message for people."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """From the process: it has stopped, for good where there is an error."""

    error: TokabatchError | None


Message = Done | Progress | Told | Standing | Ended


class EngineProcess:
    """Main's side. `receive` is called with each message, from a thread; None is the end of the process."""

    def __init__(self, spec: EngineSpec, number: int, receive: Callable[[EngineProcess, Message | None], None]) -> None:
        """Starts it; to be called from a thread that stays, since the process ends with it."""
        self.number = number
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, pickle.dumps(spec)), name=f"toka-engine-{number}")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        # Nothing of the program's main module is needed there, which may be a script that would start a server of its own.
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._reader = MessageReader(self._pipe)
        self._receive = receive
        self._hang_seconds = spec.hang_seconds
        self._silent = 0.0
        """Seconds since the last sign of life."""
        self._orders: queue.SimpleQueue[Add | Cancel | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"engine-{number}-{target.__name__}", daemon=True)
            for target in (self._listen, self._write)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, order: Add | Cancel) -> None:
        """Send without waiting for the process to receive it. If the process has ended, `receive` is notified."""
        self._orders.put(order)

    def close(self) -> None:
        """End the process, and with it the worker."""
        self._orders.put(None)
        end(self._process, STOP_SECONDS)
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        self._pipe.close()

    def how_it_ended(self) -> str:
        """Describe how the process ended, once `receive` has been notified."""
        if self._silent > self._hang_seconds:
            return f"the scheduler's process gave no sign of life for {self._silent:.0f} s and was killed"
        return f"the scheduler's process {how_it_ended(self._process)}"

    def _write(self) -> None:
        order: Add | Cancel | None = None
        try:
            while (order := self._orders.get()) is not None:
                self._pipe.send(order)
            self._pipe.send(None)
        except OSError:
            pass  # The process has ended, which `_listen` reports.
        except Exception as error:
            self._receive(self, Ended(failure_of("giving prompts to the scheduler failed", error)))

    def _listen(self) -> None:
        last: Ended | None = None
        try:
            self._receive_all()
        except BaseException as error:  # A panic of the tokenizer is no Exception.
            last = Ended(failure_of("reading what the scheduler sent failed", error))
            self._process.kill()
        end(self._process, STOP_SECONDS)
        self._orders.put(None)
        self._receive(self, last)

    def _receive_all(self) -> None:
        """Return when the process is gone; without heartbeats it is killed. Until the first one it imports."""
        heard = False
        while self._silent <= self._hang_seconds:
            try:
                if not self._pipe.poll(BEAT_SECONDS):
                    # Not by the clock: this process may have been the one that was stopped.
                    self._silent += BEAT_SECONDS if heard else 0.0
                    continue
                message = self._reader.receive()
            except (EOFError, OSError):
                return
            self._silent, heard = 0.0, True
            if message is not None:
                self._receive(self, message)
        self._process.kill()


def failure_of(what: str, error: BaseException) -> EngineError:
    """Return the message for an internal error, with the traceback of the exception being handled."""
    reason = " ".join(traceback.format_exception_only(error)[-1].split())
    return EngineError(f"{what}: {reason}; please report this\n{''.join(traceback.format_exception(error))}")


def _main(pipe: Connection, pickled: bytes) -> None:
    """The process."""
    die_with_parent()
    show_name()
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    make_tolerant()
    outbox: queue.Queue[Message | None] = queue.Queue(MAX_UNSENT)
    inbox: queue.SimpleQueue[Add | Cancel | None] = queue.SimpleQueue()
    stopped = threading.Event()
    spec: EngineSpec = pickle.loads(pickled)
    stop = Interruption(stopped.is_set)
    alive = Alive(stop)
    sender = threading.Thread(target=send_messages, args=(outbox, pipe, alive), daemon=True)
    sender.start()
    replica = Replica(
        Scheduler(spec.nothing, spec.limits, spec.stops),
        spec.make,
        depth=spec.depth,
        depth_of_few=spec.depth_of_few,
        max_restarts=spec.max_restarts,
        stop=stop,
        tell=lambda text: outbox.put(Told(text)),
        keeps_steps=False,
    )
    threading.Thread(target=_listen, args=(pipe, inbox, stopped), daemon=True).start()
    error: TokabatchError | None = None
    try:
        Loop(replica, inbox, outbox.put, alive).run(stopped)
    except TokabatchError as fault:
        error = fault
    except Stopped:
        pass
    except Exception as fault:
        error = failure_of("the scheduler failed", fault)
    replica.close()
    outbox.put(Ended(error))
    outbox.put(None)
    sender.join()


class Loop:
    """Steps, and between them what has come. `send` takes the messages to main."""

    def __init__(
        self,
        replica: Replica,
        inbox: queue.SimpleQueue[Add | Cancel | None],
        send: Callable[[Message], None],
        alive: Alive,
    ) -> None:
        self._replica = replica
        self._alive = alive
        self._inbox = inbox
        self._send = send
        self._streamed: dict[int, dict[int, int]] = {}
        """Rows whose tokens are streamed: for each unfinished sample, the number of tokens that main has."""
        self._look_next = self._stand_next = 0.0

    def run(self, stopped: threading.Event) -> None:
        """Until `stopped`, which is set before the last order, None. Raises what `Replica` raises."""
        replica, alive = self._replica, self._alive
        alive.idle = False
        self._finished(replica.start())
        self._send(replica.standing())
        while not stopped.is_set():
            alive.turns += 1
            if replica.scheduler.done:
                self._send(replica.standing())
                alive.idle = True
                order = self._inbox.get()
                alive.idle = False
                self._obey(order)
            with suppress(queue.Empty):
                while True:
                    self._obey(self._inbox.get_nowait())
            if stopped.is_set() or replica.scheduler.done:
                continue
            self._finished(replica.step())
            replica.scheduler.compact()
            now = time.monotonic()
            if self._streamed and now >= self._look_next:
                if samples := self._news():
                    self._send(Progress(samples))
                self._look_next = now + PROGRESS_SECONDS
            if now >= self._stand_next:
                self._send(replica.standing())
                self._stand_next = now + STANDING_SECONDS

    def _obey(self, order: Add | Cancel | None) -> None:
        if isinstance(order, Add):
            given, streamed = order.requests, set(order.streamed)
            rows = zip(given.row_index.tolist(), given.params.tolist(), strict=True)
            self._streamed |= {row: dict.fromkeys(range(given.sampling[at].n), 0) for row, at in rows if row in streamed}
            self._finished(self._replica.extend(order.requests))
        elif isinstance(order, Cancel):
            for row in order.rows:
                self._replica.withdraw(row)
                self._streamed.pop(row, None)

    def _news(self) -> list[tuple[int, int, int, Generated]]:
        """What streamed samples have that main does not have yet."""
        news: list[tuple[int, int, int, Generated]] = []
        for row, number, output in self._replica.scheduler.under_way(self._streamed):
            had = self._streamed[row].get(number, 0)
            if len(output.tokens) > had:
                self._streamed[row][number] = len(output.tokens)
                news.append((row, number, had, _behind(output, had)))
        return news

    def _finished(self, completions: Sequence[Completion]) -> None:
        for each in completions:
            if each.row_index in self._streamed:
                left = self._streamed[each.row_index]
                left.pop(each.sample_index, None)
                if not left:
                    del self._streamed[each.row_index]
        if completions:
            self._send(Done(CompletionBatch(completions)))


def _behind(output: Generated, count: int) -> Generated:
    """The same without its first tokens."""
    parts = (output.tokens, output.logprobs, output.top_ids, output.top_logprobs)
    return Generated(*(None if part is None else part[count:] for part in parts))  # type: ignore[arg-type]


def _listen(pipe: Connection, inbox: queue.SimpleQueue[Any], stopped: threading.Event) -> None:
    """Hand on what main sends; None, or main's end, means to stop."""
    order: Any = None
    try:
        while (order := pipe.recv()) is not None:
            inbox.put(order)
    except (EOFError, OSError):
        pass
    finally:
        stopped.set()
        inbox.put(None)
