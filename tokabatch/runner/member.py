"""Main's end of a member of a fleet: a replica in a process of its own, so that steps are not delayed by the processing of
finished samples. `member_process` is the other end.

The process is forked, so that it shares the plan's tokens without a copy; messages refer to prompts by their number in the
plan. A process started by a `Launch` instead may run on another host and has a copy of the plan. Either ends with main.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Protocol

from tokabatch.errors import ReplicaLost
from tokabatch.job import EngineConfig
from tokabatch.parallel.layout import VISIBLE, Layout
from tokabatch.report.summary import ReplicaShare
from tokabatch.runner.forked import end, fork, how_it_ended
from tokabatch.runner.ledger import Ledger, Part
from tokabatch.runner.member_process import Build, packed, serve
from tokabatch.runner.messages import (
    Ended,
    Finished,
    Message,
    Order,
    Pace,
    Share,
    Withdraw,
)
from tokabatch.runner.order_sender import MessageReader, OrderSender
from tokabatch.runner.replica import Standing

STOP_SECONDS = 10.0


class Process(Protocol):
    """Main's end of a member's process. All methods except `receive` and `check` also work after it has ended."""

    @property
    def pipe(self) -> Connection | socket:
        """The object that is readable when `receive` does not block."""
        ...

    @property
    def pid(self) -> int | None:
        """The process id; None on another host."""
        ...

    def receive(self) -> Message | None:
        """Return the next message; None is a heartbeat, or a message that has not arrived in full. Raises ReplicaLost if the
        process has ended."""
        ...

    def send(self, order: Order | bytes | None) -> None:
        """Send an order without blocking, even if the process does not read."""
        ...

    def check(self) -> bool:
        """Return whether the process runs already, so that heartbeats are due. Raises ReplicaLost if it has ended."""
        ...

    def kill(self) -> None: ...

    def hang_up(self) -> None:
        """End the connection, upon which the process ends; returns at once. `close` follows."""
        ...

    def close(self, seconds: float) -> None:
        """End the process and its worker: kill it if it has not stopped after `seconds`."""
        ...


class Launch(Protocol):
    """Starts the process of a member other than by a fork of main; the process calls `serve` with these arguments."""

    def __call__(self, number: int, build: Build, ledger: Ledger, before: Standing, pace: Pace) -> Process: ...


class Cluster(Protocol):
    """The hosts on which the members of a fleet run."""

    def layout(self, config: EngineConfig, device: str) -> Layout:
        """Return the layout of a run; `device` is that of the driver, `cpu` or `cuda`. Raises JobError if the cluster cannot
        hold it."""
        ...

    def launcher(self, layout: Layout, device: str, model: Path, tell: Callable[[str], None]) -> Launch:
        """Return what starts the members of a run with this layout; `model` is the folder from which each loads the model."""
        ...


class Member:
    """Main's side of one member. The states of its process, the event or attribute that marks the beginning of each, and the
    orders that are sent in it:

    none        before `begin`, after `close`; permanent if `given_up`          none
    pending     `begin`, if a Launch starts the process; not `placed`           work, which is queued for the process
    loading     the first heartbeat: `placed`                                   the same
    running     the first standing: `begun`                                     all
    ended       the last message: `ended`                                       none

    If the process is lost, the state is none again, whichever it was."""

    def __init__(self, number: int, devices: Sequence[str], standing: Standing) -> None:
        self.number = number
        self.devices = tuple(devices)
        self.standing = standing
        self.placed = False
        """True once the process has sent a message."""
        self.begun = False
        """True once the model is loaded."""
        self.ended: Ended | None = None
        self.wants: int | None = None
        """The number of samples waiting there if the member has requested more; None otherwise."""
        self.parts = 0
        """The number of parts that were sent to this process."""
        self.unanswered = deque[Share | Withdraw]()
        """Orders to give samples back that have not been answered yet, in order."""
        self.can_give = True
        """Whether it may have samples to give, according to its latest standing; False once it had none since."""
        self.finished = 0
        """The samples that this member has finished, including those of its lost processes."""
        self.barren = 0
        """The number of its processes lost in a row without a finished sample."""
        self.given_up = False
        """True once the member is dropped: its last process is not replaced."""
        self.silent = 0.0
        """Seconds since its last heartbeat."""
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def pipe(self) -> Connection | socket | None:
        """The `pipe` of its process; None if it has none."""
        return None if self._process is None else self._process.pipe

    @property
    def before(self) -> Standing:
        """The counts from which its next process continues."""
        return replace(self.standing, scheduled=replace(self.standing.scheduled, finished=self.finished))

    def begin(self, process: Process) -> None:
        """Begin with a new process."""
        self.placed, self.begun, self.ended, self.wants, self.can_give = False, False, None, None, True
        self.unanswered.clear()
        self.parts, self.silent, self._process = 0, 0.0, process

    def share(self, began: float, ended: float) -> ReplicaShare:
        """Return the member's share of the work between these two times of `time.monotonic`."""
        last = ended - (ended - began) / 10
        idle = () if self.ended is None else self.ended.idle
        spans = [(max(begin, since), min(end, ended)) for since in (began, last) for begin, end in idle]
        seconds = [max(0.0, end - begin) for begin, end in spans]
        whole, tail = max(ended - began, 1e-9), max(ended - last, 1e-9)
        return ReplicaShare(
            devices=self.devices,
            samples=self.finished,
            output_tokens=self.standing.scheduled.output_tokens,
            prefilled_tokens=self.standing.scheduled.prefilled_tokens,
            idle=sum(seconds[: len(idle)]) / whole,
            idle_at_end=sum(seconds[len(idle) :]) / tail,
        )

    def send(self, order: Order | None) -> None:
        """Send an order; None stops the process. If the process has ended, the next `receive` raises ReplicaLost."""
        if isinstance(order, Part):
            self.parts, self.wants, self.can_give = self.parts + 1, None, True
        elif isinstance(order, Share | Withdraw):
            self.unanswered.append(order)
        assert self._process is not None
        self._process.send(packed(order) if isinstance(order, Part) else order)

    def receive(self) -> Message | None:
        """Return the message that has arrived; None is a heartbeat or a part of a message. Raises ReplicaLost if the process
        has ended."""
        assert self._process is not None
        message = self._process.receive()
        self.silent, self.placed = 0.0, True
        if isinstance(message, Finished | Ended) and message.standing is not None:
            self.standing, self.can_give = message.standing, True
        if isinstance(message, Ended):
            self.ended = message
        self.begun = self.begun or isinstance(message, Finished | Ended)
        return message

    def pass_time(self, seconds: float) -> float:
        """Add time that passed without a heartbeat; return for how long there has been none. Raises ReplicaLost."""
        assert self._process is not None
        self.silent = self.silent + seconds if self._process.check() else 0.0
        return self.silent

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def hang_up(self) -> None:
        """Make the process end, if there is one that has not sent its last message. Call `close` afterwards."""
        if self._process is not None and self.ended is None:
            self._process.hang_up()

    def close(self) -> None:
        """End the process and its worker."""
        if self._process is None:
            return
        # The worker may still have a trace to write.
        self._process.close(STOP_SECONDS if self.ended is not None else 0.0)
        self._process = None


class Fork:
    """See `Process`: a fork of main. `leave` closes main's resources in the fork."""

    def __init__(
        self, member: Member, build: Build, first: Part, ledger: Ledger, pace: Pace, leave: Callable[[], None]
    ) -> None:
        """Start the member's process, on the `first` part."""
        self.pipe, theirs = multiprocessing.Pipe()
        arguments = (self.pipe, theirs, member, build, first, ledger, pace, leave)
        self._process = fork(_forked, arguments, f"toka-replica-{member.number}")
        theirs.close()
        self._reader = MessageReader(self.pipe)
        self._sender = OrderSender(self.pipe)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def receive(self) -> Message | None:
        try:
            return self._reader.receive()
        except (EOFError, OSError) as error:
            raise ReplicaLost(f"the scheduler's process {how_it_ended(self._process)}") from error

    def send(self, order: Order | bytes | None) -> None:
        self._sender.put(order)

    def check(self) -> bool:
        return True

    def kill(self) -> None:
        self._process.kill()

    def hang_up(self) -> None:
        self._sender.close()

    def close(self, seconds: float) -> None:
        if seconds:
            self._process.join(seconds)
        self._sender.close()
        self.pipe.close()
        end(self._process, STOP_SECONDS)


def _forked(
    mains: Connection,
    pipe: Connection,
    member: Member,
    build: Build,
    first: Part,
    ledger: Ledger,
    pace: Pace,
    leave: Callable[[], None],
) -> None:
    """Run the forked process."""
    # If this copy stayed open, the pipe would not close when main ends.
    mains.close()
    leave()
    if member.devices:
        os.environ[VISIBLE] = ",".join(member.devices)
    serve(pipe, member.number, build, first, ledger, member.before, pace)
