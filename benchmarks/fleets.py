"""How large a fleet one driver feeds: python -m benchmarks.fleets [--members 1000] [--rows 10000000]

The run's own `Fleet` and `Ledger` divide the plan, by their own messages; simulated are the members' processes and the time. A
member runs `--running` samples of log-normal lengths that nobody knows before they end (mean 200, at most 1,024 tokens); a step
takes 5 ms and a part that grows with its samples. Printed are the makespan beside the ideal (all slots of all members at work
until the last token), and what the driver takes for it: CPU seconds of dividing the plan and of taking in messages, for each
sample and each message. Not in it are the system calls of the pipes, which are measured by themselves, and what becomes of
finished samples afterwards (`benchmarks.durability`).
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.runner import fleet as fleets
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Part, to_give, wants_more
from tokabatch.runner.member import Member
from tokabatch.runner.member_process import STANDING_SECONDS, unpacked
from tokabatch.runner.messages import Finished, Given, Share, Wants
from tokabatch.runner.replica import Standing
from tokabatch.scheduling.completion_batch import CompletionBatch
from tokabatch.scheduling.contracts import NO_COUNTS, Completion, Requests, SamplingParams
from tokabatch.scheduling.scheduler import SchedulerLimits

MEAN, SIGMA, MAX_TOKENS, PROMPT, HEADER = 200, 0.7, 1024, 200, 100
STEP_SECONDS, FULL_SECONDS = 0.005, 0.025
"""A step of few samples, and one of all that run at once."""
STEPS = 8
"""A member looks at its orders and reports once in so many steps."""
PICKLED = 200
"""One message in so many is pickled and read again, to see what that takes."""


class Clock:
    """The simulated time, in the place of the module `time`."""

    now = 1.0

    def monotonic(self) -> float:
        return self.now


class SimulatedProcess:
    """See `Process`: holds and runs samples, from its first run of the plan on; `length` says how long each of the plan is."""

    pid = None

    def __init__(self, first: Part, standing: Standing, length: Int32, running: int) -> None:
        self.orders, self.messages = deque[Any](), deque[Any]()
        self._standing, self._length, self._running = standing, length, running
        self._waiting: Int64 = first.prompts.astype(np.int64)
        self._run: Int64 = np.zeros(0, np.int64)
        self._end: Int64 = np.zeros(0, np.int64)
        """The step at which each running sample has its last token."""
        self._step, self._due, self._given = 0, 0.0, 0
        self._told: int | None = None
        self.busy = 0.0
        """When it had its last token."""

    @property
    def pipe(self) -> Any:
        """There is none: `advance` is what makes messages."""
        return self

    def receive(self) -> Any:
        return self.messages.popleft()

    def send(self, order: Any) -> None:
        self.orders.append(order)

    def check(self) -> bool:
        return True

    def kill(self) -> None:
        pass

    def close(self, seconds: float = 0.0) -> None:
        pass

    def advance(self, now: float) -> float:
        """Obey, run some steps and say what is to be said; the seconds that they take."""
        while self.orders:
            order = self.orders.popleft()
            if isinstance(order, bytes):
                self._waiting = np.concatenate((self._waiting, unpacked(order).prompts.astype(np.int64)))
                self._given, self._told = self._given + 1, None
            elif isinstance(order, Share):
                count = to_give(len(self._run) + len(self._waiting), len(self._waiting), order.held)
                back = np.sort(self._waiting[len(self._waiting) - count :]).astype(np.int32)
                self._waiting = self._waiting[: len(self._waiting) - count]
                self.messages.append(Given(Part(back, np.zeros_like(back), np.ones_like(back))))
        seconds = STEP_SECONDS + (FULL_SECONDS - STEP_SECONDS) * min(1.0, self.left / self._running)
        stop = self._step + STEPS
        self._admit(np.full(self._running - len(self._run), self._step))
        finished: list[Int64] = []
        while (over := self._end <= stop).any():
            ended = self._end[over]
            finished.append(self._run[over])
            self.busy = now + (int(ended.max()) - self._step) * seconds
            self._run, self._end = self._run[~over], self._end[~over]
            self._admit(np.sort(ended))
        self._step = stop
        done = np.concatenate([np.zeros(0, np.int64), *finished])
        few = wants_more(len(self._waiting), len(self._run))
        if few and (self._told is None or (len(self._waiting) < self._told and len(self._waiting) <= self._told // 2)):
            self._told = len(self._waiting)
            self.messages.append(Wants(self._told, self._given))
        standing = None
        if now >= self._due:
            self._due = now + STANDING_SECONDS
            standing = replace(self._standing, running=len(self._run), waiting=len(self._waiting))
        if len(done) or standing is not None:
            self.messages.append(Finished(CompletionBatch(self._completions(done)), standing))
        return STEPS * seconds

    @property
    def left(self) -> int:
        """Samples that it holds."""
        return len(self._run) + len(self._waiting)

    def _admit(self, free_at: Int64) -> None:
        """Begin what waits in slots that come free at these steps."""
        count = min(len(free_at), len(self._waiting))
        begun, self._waiting = self._waiting[:count], self._waiting[count:]
        self._run = np.concatenate((self._run, begun))
        self._end = np.concatenate((self._end, free_at[:count] + self._length[begun]))

    def _completions(self, samples: Int64) -> list[Completion]:
        tokens = [np.zeros(length, np.int32) for length in self._length[samples].tolist()]
        return [
            Completion(row, 0, ids, "stop", 2, PROMPT, NO_COUNTS) for row, ids in zip(samples.tolist(), tokens, strict=True)
        ]


def requests_of(count: int) -> Requests:
    """A prompt a row; their tokens take no memory."""
    lcp = np.full(count, HEADER, np.int32)
    lcp[0] = 0
    start = np.arange(count, dtype=np.int64) * PROMPT
    tokens, length = np.broadcast_to(np.int32(2), count * PROMPT), np.full(count, PROMPT, np.int32)
    sampling = (SamplingParams(max_tokens=MAX_TOKENS),)
    return Requests(np.arange(count), tokens, start, length, lcp, np.zeros(count, np.int32), sampling)


def pipe_seconds(members: int) -> float:
    """CPU seconds of main to look once at the pipes of so many members."""
    pipes = [multiprocessing.Pipe() for _ in range(members)]
    begin = time.thread_time()
    for _ in range(20):
        pipes[0][1].send(None)
        wait([pipe for pipe, _ in pipes], 1.0)
        pipes[0][0].recv()
    return (time.thread_time() - begin) / 20


@dataclass(frozen=True, slots=True)
class Shared:
    """How a fleet got through its plan: `ideal` is the time with all slots at work to the last token, `alone` what a member
    takes for its share by itself; `cpu` the driver's CPU seconds, by what it did."""

    makespan: float
    first_idle: float
    ideal: float
    alone: float
    finished: int
    runs: int
    messages: int
    cpu: dict[str, float]


def share(count: int, rows: int, running: int) -> Shared:
    """A plan of so many rows through a fleet of so many members."""
    rng, clock = np.random.default_rng(0), Clock()
    length = np.clip(rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, rows), 1, MAX_TOKENS).astype(np.int32)
    limits, requests = SchedulerLimits(16, 1 << 20, running, 2 * running, 100, None), requests_of(rows)
    cpu: dict[str, float] = dict.fromkeys(("starting", "dividing", "taking in", "reading"), 0.0)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.thread_time()
        found = call()
        cpu[name] += time.thread_time() - begin
        return found

    def build(*given: Any, **names: Any) -> Any:
        raise AssertionError("a simulated member has no replica")

    names = {"stop": Interruption(lambda: False), "tell": print}
    fleet: Any = timed("starting", lambda: Fleet(requests, limits, [()] * count, build, **names))  # pyright: ignore
    processes: list[SimulatedProcess] = []

    def start(member: Member) -> None:
        run = fleet._next_run(member) or Part.joined([])
        processes.append(SimulatedProcess(run, Standing.before(limits), length, running))
        member.begin(processes[-1])

    events = [(clock.now + STEP_SECONDS * number / count, number) for number in range(count)]
    first, messages, read, real = clock.now, 0, 0, fleets.time
    fleets.time = clock  # pyright: ignore
    try:
        for member in fleet._members:
            timed("starting", partial(start, member))
        while fleet._ledger.left:
            clock.now, number = heapq.heappop(events)
            member, process = fleet._members[number], processes[number]
            heapq.heappush(events, (clock.now + process.advance(clock.now), number))
            while process.messages:
                messages += 1
                if messages % PICKLED == 1:
                    read += 1
                    timed("reading", partial(pickle.loads, pickle.dumps(process.messages[0])))
                timed("taking in", lambda member=member: fleet._take(member, member.receive()))
            timed("dividing", fleet._feed)
    finally:
        fleets.time = real
    cpu["reading"] *= messages / read
    busy = np.array([process.busy for process in processes]) - first
    return Shared(
        makespan=float(busy.max()),
        first_idle=float(busy.min()),
        ideal=float(length.sum(dtype=np.int64)) / (count * running) * FULL_SECONDS,
        alone=alone(length[rng.permutation(rows)[: rows // count]], running),
        finished=sum(member.finished for member in fleet._members),
        runs=count + sum(member.parts for member in fleet._members),
        messages=messages,
        cpu=cpu,
    )


def alone(length: Int32, running: int) -> float:
    """Seconds that a member takes for samples of these lengths by itself."""
    limits = SchedulerLimits(16, 1 << 20, running, 2 * running, 100, None)
    every = np.arange(len(length), dtype=np.int32)
    part = Part(every, np.zeros_like(every), np.ones_like(every))
    process, now = SimulatedProcess(part, Standing.before(limits), length, running), 0.0
    while process.left:
        now += process.advance(now)
    return process.busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--running", type=int, default=1024)
    args = parser.parse_args()
    done = share(args.members, args.rows, args.running)
    print(f"{args.members:,} members, {done.finished:,} samples in {done.runs:,} runs, {done.messages:,} messages")
    print(f"makespan {done.makespan:,.1f} s; the first member was idle at {done.first_idle:,.1f} s")
    print(f"{done.makespan / done.ideal - 1:.1%} above the ideal of {done.ideal:,.1f} s")
    print(f"{done.makespan / done.alone - 1:.1%} above the {done.alone:,.1f} s that one takes for its share by itself")
    print("CPU of the driver:")
    for name, seconds in done.cpu.items():
        each = seconds / args.rows, seconds / done.messages
        print(f"  {name:10} {seconds:8.2f} s {each[0] * 1e6:8.2f} us a sample {each[1] * 1e6:8.1f} us a message")
    print(f"  looking at all pipes {pipe_seconds(args.members) * 1e3:.2f} ms each time")


if __name__ == "__main__":
    main()
