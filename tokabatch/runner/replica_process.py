"""A replica in a process of its own, so that no step waits for what becomes of finished samples.

Main keeps the output folder and records; the replica's process holds the scheduler and starts the worker. It is forked: the
tokens of every prompt are shared that way, not copied. Finished samples come back in their order, sent by a thread whose queue
is bounded: where recording is the slower of the two, the steps are held up instead of memory. The process ends with main.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from tokabatch.engine.child import PARENTS_SIGNALS
from tokabatch.engine.heartbeat import die_with_parent
from tokabatch.errors import EngineError, ReplicaLost, Stopped, TokabatchError
from tokabatch.forecast.step_log import StepLog, Steps
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.replica import Replica, Standing
from tokabatch.scheduling.completion_batch import CompletionBatch
from tokabatch.scheduling.contracts import Completion

MAX_UNSENT = 64
"""Steps whose finished samples may be on their way to main."""
STANDING_SECONDS = 0.1
BEAT_SECONDS = 0.5
"""How often the process gives a sign of life while it has nothing to say."""
TICK_SECONDS = 0.2
"""How often the caller of `run` gets its turn while no sample is finished."""
STOP_SECONDS = 10.0
_THREADS_OF_TOKENIZERS = "TOKENIZERS_PARALLELISM"


class Build(Protocol):
    """What makes the replica. Called here for where the work stands before it begins, and again in the process."""

    def __call__(self, *, stop: Interruption, tell: Callable[[str], None]) -> Replica: ...


@dataclass(frozen=True, slots=True)
class _Finished:
    completions: list[Completion]
    standing: Standing | None


@dataclass(frozen=True, slots=True)
class _Ended:
    standing: Standing
    steps: Steps
    error: TokabatchError | None


_Message = _Finished | _Ended | str


def can_fork() -> bool:
    """Whether a process of many threads may be forked here; on macOS its system libraries forbid it."""
    return sys.platform == "linux"


class ReplicaProcess:
    """See `Replica`, whose methods these are. `build` makes one; `rebuild` makes what builds another for what is not finished,
    where the process is lost, given where that stood; `leave` lets go, in the forked process, of what is main's."""

    def __init__(
        self,
        build: Build,
        rebuild: Callable[[Standing], Build],
        *,
        stop: Interruption,
        tell: Callable[[str], None],
        max_restarts: int = 0,
        hang_seconds: float = math.inf,
        interval: float | None = None,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """At most `max_restarts` processes are lost in a row without a finished sample. One without a sign of life for
        `hang_seconds` is killed; a step that stands still is the worker's, which the replica watches. `interval` is the
        time between two standings that are sent, in seconds; None sends the first and the last alone."""
        self._build, self._rebuild = build, rebuild
        self._max_restarts, self._hang_seconds = max_restarts, hang_seconds
        self._interval, self._leave = interval, leave
        self._stop, self._tell = stop, tell
        self._standing = build(stop=stop, tell=tell).standing()
        self._process: BaseProcess | None = None
        self._pipe: Connection
        self._ended: _Ended | None = None
        self._begun = False

    def run(self) -> Iterator[list[Completion]]:
        """As `Replica.run`; yields the samples of several steps at once where they are many, an empty list where none are
        finished."""
        barren = 0
        while True:
            try:
                self._fork()
                for completions in self._messages():
                    barren = 0 if completions else barren
                    yield completions
                return
            except ReplicaLost as fault:
                barren += 1
                if barren > self._max_restarts:
                    raise EngineError(f"{fault}; giving up (engine.max_restarts). What is finished is committed.") from fault
                self._tell(f"{fault}. Starting another; what was under way is computed again")
                self.close()
                self._build = self._rebuild(self._standing)

    def _messages(self) -> Iterator[list[Completion]]:
        self._begun, self._ended = False, None
        silent = 0.0
        while True:
            with self._stop.at_once():
                ready = self._pipe.poll(TICK_SECONDS)
            message = self._receive() if ready else None
            # Counted and not measured: main may have been the one that was stopped.
            silent = 0.0 if ready else silent + TICK_SECONDS
            if silent > self._hang_seconds and self._process is not None:
                self._process.kill()
                raise ReplicaLost(f"the scheduler's process gave no sign of life for {silent:.0f} s and was killed")
            if isinstance(message, _Finished):
                yield message.completions
            elif isinstance(message, _Ended):
                if message.error is not None:
                    raise message.error
                return
            elif self._begun:
                yield []

    def standing(self, *, foresee: bool = False) -> Standing:
        """Where the work stood when the process said so last."""
        return self._standing

    def steps(self) -> Steps:
        """The steps whose results are in; none before the end."""
        return StepLog().steps() if self._ended is None else self._ended.steps

    def stop(self) -> list[Completion]:
        """Break the work off; returns what is finished and was not yielded. A process that is still loading, or does not end
        soon, is left to `close`."""
        completions: list[Completion] = []
        if self._begun and self._ended is None:
            deadline = time.monotonic() + STOP_SECONDS
            with suppress(EngineError, OSError):
                self._pipe.send(None)
                while self._ended is None and self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    message = self._receive()
                    if isinstance(message, _Finished):
                        completions += message.completions
        return completions

    def close(self) -> None:
        """End the process, and with it the worker."""
        if self._process is None:
            return
        if self._ended is not None:
            # The worker may have a trace to write.
            self._process.join(STOP_SECONDS)
        self._pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=self._serve, args=(theirs,), name="tokabatch-replica")
        # Threads of native libraries are not carried over. None of theirs is used in the fork: tokenizers' is kept from it.
        setting = os.environ.get(_THREADS_OF_TOKENIZERS)
        os.environ[_THREADS_OF_TOKENIZERS] = "false"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if setting is None:
                del os.environ[_THREADS_OF_TOKENIZERS]
            else:
                os.environ[_THREADS_OF_TOKENIZERS] = setting
        theirs.close()
        self._process = process

    def _receive(self) -> _Message | None:
        """The next message, what it tells taken in; None is a sign of life."""
        assert self._process is not None
        try:
            message: _Message | None = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(STOP_SECONDS)
            code = self._process.exitcode
            by = "ended with code" if code is None or code >= 0 else "was killed by signal"
            raise ReplicaLost(f"the scheduler's process {by} {abs(code or 0)}") from error
        if message is None:
            return None
        if isinstance(message, str):
            self._tell(message)
            return message
        if message.standing is not None:
            self._standing = message.standing
        if isinstance(message, _Ended):
            self._ended = message
        self._begun = True
        return message

    def _serve(self, pipe: Connection) -> None:
        """The forked process."""
        die_with_parent()
        for number in PARENTS_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
        # A display may have put itself before them, whose locks other threads held.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        self._pipe.close()
        self._leave()
        outbox: queue.Queue[_Message | None] = queue.Queue(MAX_UNSENT)
        stopped = threading.Event()
        sender = threading.Thread(target=_send, args=(outbox, pipe), daemon=True)
        sender.start()
        replica = self._build(stop=Interruption(stopped.is_set), tell=outbox.put)
        threading.Thread(target=_listen, args=(pipe, stopped, replica), daemon=True).start()
        error: TokabatchError | None = None
        try:
            self._work(replica, outbox, stopped)
        except TokabatchError as fault:
            error = fault
        except Stopped:
            pass
        except Exception as fault:
            reason = " ".join(traceback.format_exception_only(fault)[-1].split())
            error = EngineError(
                f"the scheduler failed: {reason}; please report this with the job file\n{traceback.format_exc()}"
            )
        outbox.put(_Ended(replica.standing(), replica.steps(), error))
        outbox.put(None)
        sender.join()
        replica.close()

    def _work(self, replica: Replica, outbox: queue.Queue[_Message | None], stopped: threading.Event) -> None:
        # The first standing tells that the model is loaded: it is always sent.
        due = 0.0
        for completions in replica.run():
            now = time.monotonic()
            if now >= due:
                outbox.put(_Finished(CompletionBatch(completions), replica.standing(foresee=self._interval is not None)))
                due = math.inf if self._interval is None else now + max(self._interval, STANDING_SECONDS)
            elif completions:
                outbox.put(_Finished(CompletionBatch(completions), None))
            if stopped.is_set():
                return


def _send(outbox: queue.Queue[_Message | None], pipe: Connection) -> None:
    """Send what is put in, until None is. Once main has closed the pipe, nothing is sent any more; the rest is `_listen`'s."""
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


def _listen(pipe: Connection, stopped: threading.Event, replica: Replica) -> None:
    """What main sends means to stop. Where it closes the pipe, the worker and this process end, whatever they stand at."""
    with suppress(EOFError, OSError):
        pipe.recv()
        stopped.set()
        pipe.recv()
    replica.close()
    os._exit(1)
