"""A process that turns finished samples into tables: main sends it samples as bytes, and receives tables.

Heartbeats come from the loop that does the work. Its judges are further processes.
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
from tokabatch.runner.preparation import Preparation
from tokabatch.scheduling.completion_batch import PackedCompletions

SEND_SECONDS, HURRIED_SEND_SECONDS = 0.2, 0.02
"""How often tables are sent that are not full, and where rows stop by their verdicts, or the run is at its end."""
BEAT_SECONDS = 0.5
"""How often a heartbeat is sent while there are samples and no table."""


@dataclass(frozen=True, slots=True)
class Work:
    """To a process: samples, and the number of each, ascending."""

    numbers: Int64
    completions: PackedCompletions


@dataclass(slots=True)
class Prepared:
    """From a process: rows of the output, as an Arrow stream, and the number of each sample."""

    numbers: Int64
    stream: pa.Buffer
    until: int | None = None
    """Samples that main has received once it has taken these, while it does that."""


Order = Work | Literal["finish", "hurry"] | None
"""To a process: samples; to `finish`, that is to send at once what is ready; to `hurry`, and not wait for verdicts; to end."""
Message = Prepared | TokabatchError | None
"""From a process; None is a heartbeat."""


def prepare(pipe: Connection, preparation: Preparation, seconds: float) -> None:
    """Run in the forked process until main ends it: send each table once it is full, and every `seconds` what is ready."""
    keep_only((pipe.fileno(),))
    for number in PARENTS_SIGNALS:
        # Caught, not ignored: judges, and what they start, are to begin with the system's way.
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
        while True:
            for order in _orders(inbox, min(seconds, BEAT_SECONDS) if preparation.num_waiting else None):
                if order is None:
                    return
                if isinstance(order, Work):
                    preparation.add(order.completions, order.numbers)
                elif order == "finish":
                    seconds = HURRIED_SEND_SECONDS
                else:
                    preparation.hurry()
            preparation.start_judges()
            everything = time.monotonic() >= due
            for table in preparation.tables(sent, everything=everything):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                _send(pipe, Prepared(preparation.numbers(table.num_rows), sink.getvalue()))
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


def _send(pipe: Connection, message: Message) -> None:
    try:
        pipe.send(message)
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
    """Receive what main sends."""
    order: Order = None
    with suppress(EOFError, OSError):
        while (order := pipe.recv()) is not None:
            inbox.put(order)
    inbox.put(None)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The signal is main's."""
