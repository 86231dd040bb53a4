"""The loop of a member's process: it runs the steps of its replica, follows orders between steps, and sends finished samples.

The orders assign samples to it or request some back. A thread sends finished samples to main in their order, from a bounded
queue: if recording is slower than the steps, the steps are delayed and memory use does not grow.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.errors import EngineError, Stopped, TokabatchError
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
    Pace,
    Share,
    Suspects,
    Wants,
    Withdraw,
)
from tokabatch.runner.replica import Replica, Standing
from tokabatch.scheduling.completion_batch import PackedOnTheWay
from tokabatch.scheduling.contracts import Completion, Requests

MAX_UNSENT = 64
"""The most messages in the queue to main."""
SAMPLES_SENT = 2048
"""Finished samples in a message at most: main takes in the first of a step while the next ones are being packed."""
STANDING_SECONDS = 0.1
BEAT_SECONDS = 0.5
"""Seconds between heartbeats while there is nothing else to send."""


class Build(Protocol):
    """Creates the replica of a member, given its number and first requests. `before` is the standing of the replica that it
    replaces, whose counts it continues."""

    def __call__(
        self, number: int, requests: Requests, before: Standing, *, stop: Interruption, tell: Callable[[str], None]
    ) -> Replica: ...


def packed(part: Part) -> bytes:
    """Return a compact encoding of a part, which mostly consists of consecutive prompts with all their samples."""
    table = np.stack((np.diff(part.prompts, prepend=np.int32(0)), part.first, part.stop))
    return zlib.compress(table.astype(np.int32).tobytes(), 1)


def unpacked(text: bytes) -> Part:
    """Decode the result of `packed`."""
    step, first, stop = np.frombuffer(zlib.decompress(text), np.int32).reshape(3, -1)
    return Part(np.cumsum(step, dtype=np.int32), first, stop)


def serve(
    pipe: Connection,
    number: int,
    build: Build,
    first: Part,
    ledger: Ledger,
    before: Standing,
    pace: Pace,
) -> None:
    """Run the process of member `number`, in its main thread, until main stops it: `build` the replica for the `first` part of
    the plan, with counts that continue from `before`, run its steps, and report at this `pace`. If main closes the pipe, the
    process ends at once."""
    outbox: queue.Queue[Message | None] = queue.Queue(MAX_UNSENT)
    inbox: queue.Queue[Order | None] = queue.Queue()
    stopped = threading.Event()
    stop = Interruption(stopped.is_set)
    alive = Alive(stop)
    sender = threading.Thread(target=send_messages, args=(outbox, pipe, alive), daemon=True)
    sender.start()
    requests = ledger.plan.part(first.prompts, first.first, first.stop)
    replica = build(number, requests, before, stop=stop, tell=outbox.put)
    over = threading.Event()
    threading.Thread(target=_listen, args=(pipe, inbox, stopped, replica, over), daemon=True).start()
    loop = _Loop(replica, ledger, inbox, outbox, pace, alive)
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


class Alive:
    """Whether the loop of a scheduler's process makes progress: it has completed an iteration since the last call, is idle, or
    is blocked on the worker, which has a heartbeat of its own. Heartbeats are sent only then, as their thread would otherwise
    go on sending them beside a loop that hangs."""

    def __init__(self, stop: Interruption) -> None:
        self.turns = 0
        self.idle = True
        """True while there is nothing to do, and before the loop begins."""
        self._stop = stop
        self._seen = 0

    def __call__(self) -> bool:
        moved, self._seen = self.turns != self._seen, self.turns
        return moved or self.idle or self._stop.waits


class _Loop:
    """The steps of a replica and, between them, the orders of main."""

    def __init__(
        self,
        replica: Replica,
        ledger: Ledger,
        inbox: queue.Queue[Order | None],
        outbox: queue.Queue[Message | None],
        pace: Pace,
        alive: Alive,
    ) -> None:
        self.idle: list[tuple[float, float]] = []
        self._replica = replica
        self._ledger = ledger
        self._inbox, self._outbox = inbox, outbox
        self._pace = pace
        self._alive = alive
        self._finished: list[Completion] = []
        """The finished samples that have not been sent to main yet."""
        self._parts = 0
        self._told: int | None = None
        """The number of waiting samples when more were requested."""
        self._suspects: Int64 = np.zeros(0, np.int64)
        self._due = self._next_message = 0.0

    def run(self, stopped: threading.Event) -> None:
        """Run until main sends the order to stop. The samples finished by then, or when a step fails, are sent."""
        try:
            self._run(stopped)
        finally:
            self._send(None)

    def _run(self, stopped: threading.Event) -> None:
        replica, alive = self._replica, self._alive
        alive.idle = False
        # The first standing is always sent: it shows that the model is loaded.
        self._finished += replica.start()
        self._tell()
        while not stopped.is_set():
            alive.turns += 1
            completions: list[Completion] = []
            if replica.scheduler.done:
                self._due = 0.0 if self._pace.standing is not None else self._due
                self._tell()
                self._want()
                began = time.monotonic()
                alive.idle = True
                order = self._inbox.get()
                alive.idle = False
                self.idle.append((began, time.monotonic()))
                completions += self._obey(order)
            with suppress(queue.Empty):
                while True:
                    completions += self._obey(self._inbox.get_nowait())
            if not replica.scheduler.done and not stopped.is_set():
                # What earlier steps have finished is sent once the next ones are with the worker, which computes meanwhile.
                completions += replica.step(self._tell)
                if not self._outbox.full():
                    self._want()
            self._finished += completions
            if replica.scheduler.done:
                self._tell()

    def _tell(self) -> None:
        """Send finished samples and the standing if they are due. While main is behind, samples are collected for a larger
        message instead, so that a pause of main does not delay the steps."""
        now, done = time.monotonic(), self._replica.scheduler.done
        if self._outbox.full() and len(self._finished) < SAMPLES_SENT and not done:
            return
        if now >= self._due:
            every = self._pace.standing
            self._send(self._replica.standing(foresee=every is not None))
            self._due = float("inf") if every is None else now + max(every, STANDING_SECONDS)
            self._next_message = now + self._pace.finished
        elif now >= self._next_message or len(self._finished) >= SAMPLES_SENT or done:
            self._send(None)
            self._next_message = now + self._pace.finished
        suspects = self._replica.scheduler.suspected_rows()
        if not np.array_equal(suspects, self._suspects):
            self._outbox.put(Suspects(suspects))
        self._suspects = suspects

    def _send(self, standing: Standing | None) -> None:
        """Send the finished samples, with the standing in the last message."""
        headway = self._replica.scheduler.headway if self._pace.headway else 0.0
        while len(self._finished) > SAMPLES_SENT:
            self._outbox.put(Finished(PackedOnTheWay(self._finished[:SAMPLES_SENT]), None, headway))
            self._finished = self._finished[SAMPLES_SENT:]
        if self._finished or standing is not None:
            self._outbox.put(Finished(PackedOnTheWay(self._finished), standing, headway))
        self._finished = []

    def _want(self) -> None:
        """Request more samples if few are waiting, and again when their number has halved."""
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
            waiting, scheduler = replica.waiting, replica.scheduler
            given = replica.give_back(to_give(waiting + scheduler.num_running - scheduler.headway, waiting, order.work))
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


def send_messages(outbox: queue.Queue[Any], pipe: Connection, alive: Callable[[], bool]) -> None:
    """Send the messages of the queue until None. A heartbeat (None) is sent first, and in between while the loop is `alive`.
    After main has closed the pipe, messages are discarded; the receiving thread handles that case."""
    message, beat = None, True
    while message is not None or beat:
        if message is not None or alive():
            with suppress(OSError):
                pipe.send(message)
        try:
            message, beat = outbox.get(timeout=BEAT_SECONDS), False
        except queue.Empty:
            message, beat = None, True


def _listen(
    pipe: Connection, inbox: queue.Queue[Any], stopped: threading.Event, replica: Replica, over: threading.Event
) -> None:
    """Pass on the orders of main; None means to stop. If main closes the pipe before all is `over`, end the worker and this
    process immediately."""
    with suppress(EOFError, OSError):
        while True:
            order = pipe.recv()
            if order is None:
                stopped.set()
            inbox.put(order)
    if not over.is_set():
        replica.close()
        os._exit(1)
