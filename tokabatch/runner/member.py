"""A member of a fleet, as main reaches it: a replica in a process of its own, so that no step waits for what becomes of
finished samples. What that process does is in `member_process`.

The process is forked: the plan's tokens are shared that way, not copied, and what crosses the pipe names prompts by their place
in the plan. Where a `Launch` starts it instead, it may be on another host, and has a copy of the plan. It ends with main.
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
from tokabatch.runner.outbox import Outbox
from tokabatch.runner.replica import Standing

STOP_SECONDS = 10.0


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

    def send(self, order: Order | bytes | None) -> None:
        """Returns at once, whether or not the process reads."""
        ...

    def check(self) -> bool:
        """Whether there is a process already, which gives heartbeats. Raises ReplicaLost where it is gone."""
        ...

    def kill(self) -> None: ...

    def hang_up(self) -> None:
        """End the connection, upon which the process ends; returns at once. `close` follows."""
        ...

    def close(self, seconds: float) -> None:
        """End the process, and with it the worker; it has so many seconds for that."""
        ...


class Launch(Protocol):
    """What starts the process of a member elsewhere than by a fork of main: it calls `serve` with these arguments, and with
    `before` and `pace` as they are there."""

    def __call__(self, number: int, build: Build, ledger: Ledger, before: Standing, pace: Pace) -> Process: ...


class Cluster(Protocol):
    """Where the members of a fleet run that are not on this host alone."""

    def layout(self, config: EngineConfig, device: str) -> Layout:
        """How a run is laid out there whose driver is on a `cpu` or sees a GPU, `cuda`. Raises JobError."""
        ...

    def launcher(self, layout: Layout, device: str, model: Path, tell: Callable[[str], None]) -> Launch:
        """What starts the members of a run of this layout; `model` is the folder that each of them reads."""
        ...


class Member:
    """Main's side of one member. Where its process stands, each line until the next, and what is sent to it meanwhile:

    no process            before `begin`, after `close`; for good once `given_up`   nothing
    waits for a place     `begin`, if a Launch starts it; not `placed`              work, which its process keeps for it
    loads                 the first heartbeat: `placed`                             the same
    at work               the first standing: `begun`                               every order
    has ended             its last word: `ended`                                    nothing

    A lost process goes from any line to the first one."""

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
        self.unanswered = deque[Share | Withdraw]()
        """Orders to give samples back, in turn; each is answered."""
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
        self.placed, self.begun, self.ended, self.wants, self.can_give = False, False, None, None, True
        self.unanswered.clear()
        self.parts, self.silent, self._process = 0, 0.0, process

    def share(self, began: float, ended: float) -> ReplicaShare:
        """Return what it did of the work between these two times of `time.monotonic`."""
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
        """None is to end. Where the process is gone, the next `receive` says so."""
        if isinstance(order, Part):
            self.parts, self.wants, self.can_give = self.parts + 1, None, True
        elif isinstance(order, Share | Withdraw):
            self.unanswered.append(order)
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

    def pass_time(self, seconds: float) -> float:
        """So much time has passed without a heartbeat; return for how long there has been none. Raises ReplicaLost."""
        assert self._process is not None
        self.silent = self.silent + seconds if self._process.check() else 0.0
        return self.silent

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def hang_up(self) -> None:
        """Have the process end, if there is one that has not said its last word; `close` follows."""
        if self._process is not None and self.ended is None:
            self._process.hang_up()

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
        self, member: Member, build: Build, first: Part, ledger: Ledger, pace: Pace, leave: Callable[[], None]
    ) -> None:
        """Start the member's process, on the `first` part."""
        self.pipe, theirs = multiprocessing.Pipe()
        arguments = (self.pipe, theirs, member, build, first, ledger, pace, leave)
        self._process = fork(_forked, arguments, f"tokabatch-replica-{member.number}")
        theirs.close()
        self._outbox = Outbox(self.pipe)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def receive(self) -> Message | None:
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise ReplicaLost(f"the scheduler's process {how_it_ended(self._process)}") from error

    def send(self, order: Order | bytes | None) -> None:
        self._outbox.put(order)

    def check(self) -> bool:
        return True

    def kill(self) -> None:
        self._process.kill()

    def hang_up(self) -> None:
        self._outbox.close()

    def close(self, seconds: float) -> None:
        if seconds:
            self._process.join(seconds)
        self._outbox.close()
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
    """The forked process."""
    # While this one has it open, too, the pipe does not end with main.
    mains.close()
    leave()
    if member.devices:
        os.environ[VISIBLE] = ",".join(member.devices)
    serve(pipe, member.number, build, first, ledger, member.before, pace)
