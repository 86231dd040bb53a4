"""How large a fleet one driver feeds: python -m benchmarks.fleets [--members 1000] [--rows 10000000]

The run's own `Fleet` divides the plan, by its own messages; simulated are the members' processes, the time, and what can be
read. A member runs `--running` samples of log-normal lengths that nobody knows before they end (mean 200, at most 1,024
tokens); a step takes 5 ms and a part that grows with its samples, 25 ms for all of them. Members go on while the driver
works, for as long as its CPU time says: where they are too many for it, messages pile up and members are idle. `--record`
adds so many microseconds for each sample, for what becomes of finished ones (`benchmarks.durability`). Not in it are the
system calls of the pipes.

The makespan stands beside two ideals: all slots of all members at work until the last token, and `pooled`, one member with the
slots of all, which takes the next sample wherever a slot comes free. What lies between these two is the end of any run whose
lengths are not known, and what is above the second one is the price of dividing.
"""

from __future__ import annotations

import argparse
import heapq
import math
import pickle
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tokabatch.arrays import Float64, Int32, Int64
from tokabatch.forecast.step_log import StepLog
from tokabatch.runner import fleet as fleets
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Part, to_give, wants_more
from tokabatch.runner.member_process import STANDING_SECONDS, unpacked
from tokabatch.runner.messages import Ended, Finished, Given, Share, Wants
from tokabatch.runner.replica import Standing
from tokabatch.scheduling.completion_batch import PackedCompletions
from tokabatch.scheduling.contracts import NO_COUNTS, Completion, Requests, SamplingParams
from tokabatch.scheduling.lengths.length_estimates import HORIZON
from tokabatch.scheduling.scheduler import SchedulerLimits

MEAN, SIGMA, MAX_TOKENS, PROMPT, HEADER = 200, 0.7, 1024, 200, 100
STEP_SECONDS, FULL_SECONDS = 0.005, 0.025
"""A step of few samples, and one of all that run at once."""
PICKLED = 50
"""The messages of one pass in so many are pickled and read again, to see what that takes."""


class SimulatedProcess:
    """See `Process`: holds and runs samples; `length` says how long each of the plan is. It looks at its orders and reports
    once in so many `steps`."""

    pid = None

    def __init__(
        self,
        standing: Standing,
        length: Int32,
        running: int,
        steps: int,
        seconds: tuple[float, float] = (STEP_SECONDS, FULL_SECONDS),
        begins: float = 0.0,
    ) -> None:
        """A step of few samples and one of all take so many `seconds`. It has loaded its model at the time `begins`; its first
        run is given to it before."""
        self.orders, self.messages, self._pending = deque[Any](), deque[Any](), list[Any]()
        self._standing, self._length, self._running, self._steps = standing, length, running, steps
        self._waiting: Int64 = np.zeros(0, np.int64)
        self._run: Int64 = np.zeros(0, np.int64)
        self._end: Int64 = np.zeros(0, np.int64)
        """The step at which each running sample has its last token."""
        self._step, self._due, self._given = 0, 0.0, 0
        self._told: int | None = None
        self.busy = 0.0
        """When it had its last token."""
        self._seconds, self._begins = seconds, begins
        self._expected = expected_left(length)

    @property
    def pipe(self) -> Any:
        """There is none: `Time` says which processes have messages."""
        return self

    def receive(self) -> Any:
        return self.messages.popleft()

    def send(self, order: Any) -> None:
        if order is None:
            self.messages.append(Ended(self._standing, StepLog().steps(), (), None))
        else:
            self.orders.append(order)

    def check(self) -> bool:
        return True

    def kill(self) -> None:
        pass

    def close(self, seconds: float = 0.0) -> None:
        pass

    def advance(self, now: float) -> float:
        """Send what the last steps have made, obey, and run some more; the seconds that these take."""
        self.messages += self._pending
        self._pending = []
        while self.orders:
            order = self.orders.popleft()
            if isinstance(order, bytes):
                self._waiting = np.concatenate((self._waiting, unpacked(order).prompts.astype(np.int64)))
                self._given, self._told = self._given + 1, None
            elif isinstance(order, Share):
                count = to_give(self.left - self.headway, len(self._waiting), order.work)
                back = np.sort(self._waiting[len(self._waiting) - count :]).astype(np.int32)
                self._waiting = self._waiting[: len(self._waiting) - count]
                self.messages.append(Given(Part(back, np.zeros_like(back), np.ones_like(back))))
        if now < self._begins:
            if self._told is None and not self._given:
                self._told = 0
                self.messages += [None, Wants(0, 0)]
            return self._begins - now
        few, full = self._seconds
        seconds = few + (full - few) * min(1.0, self.left / self._running)
        steps = self._steps if self.left else 1
        stop = self._step + steps
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
        hungry = wants_more(len(self._waiting), len(self._run))
        if hungry and (self._told is None or (len(self._waiting) < self._told and len(self._waiting) <= self._told // 2)):
            self._told = len(self._waiting)
            self.messages.append(Wants(self._told, self._given))
        standing = None
        if now >= self._due:
            self._due = now + STANDING_SECONDS
            standing = replace(self._standing, running=len(self._run), waiting=len(self._waiting))
        if len(done) or standing is not None:
            self._pending.append(Finished(PackedCompletions.of(self._completions(done)), standing, self.headway))
        return steps * seconds

    @property
    def left(self) -> int:
        """Samples that it holds."""
        return len(self._run) + len(self._waiting)

    @property
    def headway(self) -> float:
        """See `Scheduler`: by the lengths of all samples of the plan, as a run knows them once many have ended."""
        age = self._step - self._end + self._length[self._run]
        return len(age) - float(self._expected[np.minimum(age, len(self._expected) - 1)].sum())

    @property
    def given(self) -> int:
        """Runs of the plan that it was given."""
        return self._given

    def hold(self, samples: Int64) -> None:
        """Have these from the beginning."""
        self._waiting = samples

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


def expected_left(length: Int32) -> Float64:
    """For each number of tokens, those expected up to the horizon over those of a sample that begins."""
    reaching = 1 - np.cumsum(np.bincount(length)[:-1]) / len(length)
    longer = np.append(np.cumsum(reaching[::-1])[::-1], 0.0)
    within = math.ceil(HORIZON * length.mean())
    expected = longer[:-1] - longer[np.minimum(np.arange(len(reaching)) + within, len(reaching))]
    return expected / reaching / (expected[0] / reaching[0])


def requests_of(count: int) -> Requests:
    """A prompt a row; their tokens take no memory."""
    lcp = np.full(count, HEADER, np.int32)
    lcp[0] = 0
    start = np.arange(count, dtype=np.int64) * PROMPT
    tokens, length = np.broadcast_to(np.int32(2), count * PROMPT), np.full(count, PROMPT, np.int32)
    sampling = (SamplingParams(max_tokens=MAX_TOKENS),)
    return Requests(np.arange(count), tokens, start, length, lcp, np.zeros(count, np.int32), sampling)


class Time:
    """In the place of the module `time` and of `wait`: the driver's clock, by which members go on while it works."""

    def __init__(self, record: float) -> None:
        self.now = 1.0
        self.busy = self.reading = self.recording = 0.0
        """The driver's seconds: all of them, and those for reading messages and for recording samples, which are reckoned."""
        self.messages = self.passes = 0
        self._record, self._read = record, 0
        self._pickle_seconds = 0.0
        self._processes: list[SimulatedProcess] = []
        self._events: list[tuple[float, int]] = []
        self._began = time.thread_time()

    def monotonic(self) -> float:
        return self.now

    def add(self, process: SimulatedProcess) -> None:
        heapq.heappush(self._events, (self.now, len(self._processes)))
        self._processes.append(process)

    def start(self) -> float:
        """The run begins; CPU seconds of what was before it."""
        before, self._began = self._began, time.thread_time()
        return self._began - before

    def took(self, samples: int) -> None:
        """The driver has so many samples to record."""
        self.recording += samples * self._record
        self.now += samples * self._record

    def wait(self, pipes: list[Any], timeout: float) -> list[SimulatedProcess]:
        """The processes that have messages by the time that the driver has done its work."""
        seconds = time.thread_time() - self._began
        self.busy, self.now, self.passes = self.busy + seconds, self.now + seconds, self.passes + 1
        until = self.now + timeout
        ready = [process for process in pipes if process.messages]
        while self._events[0][0] <= (self.now if ready else until):
            at, number = heapq.heappop(self._events)
            process = self._processes[number]
            heapq.heappush(self._events, (at + process.advance(at), number))
            if process.messages and not ready:
                self.now = max(self.now, at)
                ready.append(process)
        ready = [process for process in pipes if process.messages]
        self.now = self.now if ready else until
        self._read_some([process.messages[0] for process in ready])
        self._began = time.thread_time()
        return ready

    def _read_some(self, messages: list[Any]) -> None:
        """What reading these takes goes by: measured in some passes, reckoned for the others."""
        self.messages += len(messages)
        if messages and (self.passes % PICKLED == 1 or not self._read):
            texts = [pickle.dumps(message) for message in messages]
            begin = time.thread_time()
            for text in texts:
                pickle.loads(text)
            self._pickle_seconds += time.thread_time() - begin
            self._read += len(messages)
        seconds = len(messages) * self._pickle_seconds / max(1, self._read)
        self.reading, self.now = self.reading + seconds, self.now + seconds

    @contextmanager
    def simulated(self) -> Generator[None]:
        real = fleets.time, fleets.wait
        fleets.time, fleets.wait = self, self.wait  # pyright: ignore
        try:
            yield
        finally:
            fleets.time, fleets.wait = real


@dataclass(frozen=True, slots=True)
class Shared:
    """How a fleet got through its plan, in seconds. `full_slots` is the time with all slots at work to the last token, `pooled`
    what one member with all of them takes, `alone` what a member takes for its share by itself; `starting` the driver's before
    the run, `busy` those in it, of which `reading` and `recording` are reckoned."""

    makespan: float
    first_idle: float
    full_slots: float
    pooled: float
    alone: float
    finished: int
    runs: int
    messages: int
    passes: int
    starting: float
    busy: float
    reading: float
    recording: float
    idle: tuple[float, ...]
    """Of each member, between its last token and the fleet's; `samples` are those that it finished."""
    samples: tuple[int, ...]


def share(
    count: int,
    rows: int,
    running: int,
    record: float = 0.0,
    *,
    sigma: float = SIGMA,
    seconds: tuple[float, float] = (STEP_SECONDS, FULL_SECONDS),
    late: float = 0.0,
) -> Shared:
    """A plan of so many rows through a fleet of so many members; `record` are the driver's seconds for a finished sample.
    Lengths are log-normal with this `sigma`, steps take so many `seconds` (of few samples, of all), and the last member begins
    `late` seconds after the first."""
    rng, clock = np.random.default_rng(0), Time(record)
    length = np.clip(rng.lognormal(np.log(MEAN) - sigma**2 / 2, sigma, rows), 1, MAX_TOKENS).astype(np.int32)
    limits = SchedulerLimits(16, 1 << 20, running, 2 * running, 100, None)
    processes: list[SimulatedProcess] = []

    def launch(number: int, build: Any, ledger: Any, before: Standing, pace: Any) -> SimulatedProcess:
        steps = max(1, round(pace.finished / seconds[1]))
        begins = clock.now + late * number / max(1, count - 1) if late else 0.0
        processes.append(SimulatedProcess(Standing.before(limits), length, running, steps, seconds, begins))
        clock.add(processes[-1])
        return processes[-1]

    def build(*given: Any, **names: Any) -> Any:
        raise AssertionError("a simulated member has no replica")

    with clock.simulated():
        stop = Interruption(lambda: False)
        fleet = Fleet(requests_of(rows), limits, [()] * count, build, stop=stop, tell=print, launch=launch)
        starting, begun = clock.start(), clock.now
        for completions in fleet.run():
            clock.took(len(completions))
        shares = fleet.shares()
    busy = np.array([process.busy for process in processes]) - begun
    return Shared(
        makespan=float(busy.max()),
        first_idle=float(busy.min()),
        full_slots=float(length.sum(dtype=np.int64)) / (count * running) * seconds[1],
        pooled=alone(length, count * running, seconds),
        alone=alone(length[rng.permutation(rows)[: rows // count]], running, seconds),
        finished=sum(each.samples for each in shares),
        runs=sum(process.given for process in processes),
        messages=clock.messages,
        passes=clock.passes,
        starting=starting,
        busy=clock.busy + clock.reading + clock.recording,
        reading=clock.reading,
        recording=clock.recording,
        idle=tuple((busy.max() - busy).tolist()),
        samples=tuple(each.samples for each in shares),
    )


def alone(length: Int32, running: int, seconds: tuple[float, float]) -> float:
    """Seconds that a member takes for samples of these lengths by itself."""
    limits = SchedulerLimits(16, 1 << 20, running, 2 * running, 100, None)
    process, now = SimulatedProcess(Standing.before(limits), length, running, 1, seconds), 0.0
    process.hold(np.arange(len(length)))
    while process.left:
        now += process.advance(now)
    return process.busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--record", type=float, default=0.0, metavar="MICROSECONDS")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="of the lengths' logarithm; 0: all have the same")
    parser.add_argument("--late", type=float, default=0.0, help="seconds by which the last member begins after the first")
    parser.add_argument("--seconds", type=float, nargs=2, default=(STEP_SECONDS, FULL_SECONDS), metavar=("FEW", "FULL"))
    args = parser.parse_args()
    options = {"sigma": args.sigma, "seconds": tuple(args.seconds), "late": args.late}
    done = share(args.members, args.rows, args.running, args.record / 1e6, **options)
    print(f"{args.members:,} members, {done.finished:,} samples in {done.runs:,} runs, {done.messages:,} messages")
    print(f"makespan {done.makespan:,.2f} s; the first member was idle at {done.first_idle:,.2f} s")
    if args.members <= 16:
        print(
            f"  samples {', '.join(map(str, done.samples))}; idle at the end {', '.join(f'{idle:.2f}' for idle in done.idle)} s"
        )
    for name, seconds in (
        ("all slots full", done.full_slots),
        ("pooled", done.pooled),
        ("one member's share alone", done.alone),
    ):
        print(f"  {name:26} {seconds:8.2f} s   the fleet {done.makespan / seconds - 1:+.1%}")
    print(f"the driver was busy for {done.busy:,.1f} s ({done.busy / done.makespan:.0%}), in {done.passes:,} passes")
    print(f"  and for {done.starting:.1f} s before the run")
    dividing = done.busy - done.reading - done.recording
    for name, seconds in (("reading", done.reading), ("booking and dividing", dividing), ("recording", done.recording)):
        each = seconds / args.rows, seconds / done.messages
        print(f"  {name:22} {seconds:8.2f} s {each[0] * 1e6:8.2f} us a sample {each[1] * 1e6:8.1f} us a message")


if __name__ == "__main__":
    main()
