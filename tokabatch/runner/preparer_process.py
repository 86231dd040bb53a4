"""The loop of a process that turns packed samples from main into tables (see `preparers`).

The loop that does the work also sends the heartbeats. Judges run in further processes.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Literal

import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.engine.child import PARENTS_SIGNALS
from tokabatch.errors import EngineError, TokabatchError
from tokabatch.runner.forked import keep_only
from tokabatch.runner.order_sender import send_buffer
from tokabatch.runner.preparation import Preparation
from tokabatch.scheduling.completion_batch import PackedCompletions

SEND_SECONDS, HURRIED_SEND_SECONDS = 0.2, 0.02
"""Seconds between tables that are not full; the shorter interval applies if verdicts can stop rows, and at the end of a run."""
BEAT_SECONDS = 0.5
"""Seconds between heartbeats while there are samples."""


@dataclass(frozen=True, slots=True)
class Work:
    """Sent to a process: samples and their numbers, ascending."""

    numbers: Int64
    completions: PackedCompletions


@dataclass(slots=True)
class Prepared:
    """Sent by a process, with an Arrow stream of so many bytes behind it: rows of the output, and the number of each sample."""

    numbers: Int64
    num_bytes: int
    stream: pa.Buffer | None = None
    """The stream, once it has been received."""
    until: int | None = None
    """The number of samples that main will have received with this table; None while it has not been taken up."""


Order = Work | Literal["finish", "hurry"] | None
"""Sent to a process: samples; "finish", to send tables at short intervals from now on; "hurry", to stop judging; None, to
end."""
Message = Prepared | TokabatchError | None
"""Sent by a process: a table, an error, or None as a heartbeat."""


def prepare(pipe: Connection, preparation: Preparation, seconds: float) -> None:
    """Run in the forked process until main stops it: send each full table at once, and every `seconds` what is ready."""
    keep_only((pipe.fileno(),))
    for number in PARENTS_SIGNALS:
        # A handler, unlike SIG_IGN, is not inherited by judges and the programs that they start.
        signal.signal(number, _nothing)
    try:
        _serve(pipe, preparation, seconds)
    except _Gone:
        pass
    except TokabatchError as error:
        _send(pipe, error)
    except Exception as error:
        reason = " ".join(traceback.format_exception_only(error)[-1].split())
        text = f"preparing samples failed: {reason}; please report this with the job file\n{traceback.format_exc()}"
        _send(pipe, EngineError(text))


def _serve(pipe: Connection, preparation: Preparation, seconds: float) -> None:
    inbox = queue.Queue[Order]()
    threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    sent, due, beat = 0, 0.0, 0.0
    try:
        preparation.start_judges()
        while True:
            for order in _orders(inbox, min(seconds, BEAT_SECONDS) if preparation.num_waiting else None):
                if order is None:
                    return
                if isinstance(order, Work):
                    preparation.add(order.completions, order.numbers)
                elif order == "finish":
                    seconds, due = HURRIED_SEND_SECONDS, 0.0
                else:
                    preparation.close()
            preparation.start_judges()
            everything = time.monotonic() >= due
            for table in preparation.tables(sent, everything=everything):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                rows = sink.getvalue()
                _send(pipe, Prepared(preparation.numbers(table.num_rows), rows.size), rows)
                sent += table.num_rows
            now = time.monotonic()
            due = now + seconds if everything else due
            if now >= beat:
                _send(pipe, None)
                beat = now + BEAT_SECONDS
    finally:
        preparation.close()


class _Gone(Exception):
    """Main has closed the pipe."""


def _send(pipe: Connection, message: Message, behind: pa.Buffer | None = None) -> None:
    try:
        pipe.send(message)
        if behind is not None:
            send_buffer(pipe, memoryview(behind))
    except OSError as error:
        raise _Gone from error


def _orders(inbox: queue.Queue[Any], seconds: float | None) -> Sequence[Order]:
    """Return all orders that have arrived, or the first that arrives within `seconds` (None is no limit)."""
    orders: list[Order] = []
    with suppress(queue.Empty):
        orders.append(inbox.get(timeout=seconds))
        while True:
            orders.append(inbox.get_nowait())
    return orders


def _listen(pipe: Connection, inbox: queue.Queue[Order]) -> None:
    """Put the orders from main into the queue, with None at the end of the pipe."""
    order: Order = None
    with suppress(EOFError, OSError):
        while (order := pipe.recv()) is not None:
            inbox.put(order)
    inbox.put(None)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: main handles the signal and stops this process."""
