"""Replicas in processes of their own yield the samples of one in this process, however many they are, however slowly they are
taken, and whatever happens to the processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from support import token_device
from support.shortsighted import Shortsighted

from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import EngineError, ReplicaLost, Stopped, WorkerLost
from tokabatch.runner import member_process
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.forked import can_fork
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Part
from tokabatch.runner.member import Fork
from tokabatch.runner.member_process import unpacked
from tokabatch.runner.messages import Given, Lengths, Pace, Share, Suspects, Withdraw
from tokabatch.runner.replica import Replica, Standing
from tokabatch.runner.row_stops import RowLimits
from tokabatch.scheduling.contracts import Completion, Drawn, Requests, SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

PROMPTS = [[row // 2, 2, 3, 4, 5, 6, 7, row] for row in range(8)]
LIMITS = SchedulerLimits(4, 200, 16, 64, 16, GroupingLimits(2, 1))
PARAMS = SamplingParams(n=6, max_tokens=30, ignore_eos=True)
EXPECTED = {
    (row, sample): token_device.expected_output(row, sample, len(PROMPTS[row]), PARAMS)
    for row in range(len(PROMPTS))
    for sample in range(PARAMS.n)
}

pytestmark = pytest.mark.skipif(not can_fork(), reason="a process of threads is forked on Linux alone")


class Device:
    """An executor inside the replica's process; each step takes `seconds`."""

    def __init__(self, seconds: float = 0.0, load_seconds: float = 0.0, num_pages: int = 200) -> None:
        self.sizes = ReplicaSizes(4, num_pages, 16, 64, 16, 2, 1)
        self.device, self.waiting = token_device.TokenDevice(LIMITS), list[StepResult]()
        self.device.prompts = PROMPTS
        self.seconds, self.load_seconds = seconds, load_seconds

    def start(self) -> None:
        time.sleep(self.load_seconds)

    def submit(self, step: StepBatch) -> None:
        self.waiting.append(self.device.run(step))

    def collect(self) -> StepResult:
        time.sleep(self.seconds)
        return self.waiting.pop(0)

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Work:
    """What is to do, and what of it is done, by so many `members`."""

    def __init__(
        self,
        make: Callable[[], Device] = Device,
        members: int = 1,
        drawn: Drawn | None = None,
        short: bool = False,
        **options: float,
    ) -> None:
        self.requests = token_device.make_requests(PROMPTS, [PARAMS])
        if drawn is not None:
            self.requests = self.requests.without(drawn)
        self.done: dict[tuple[int, int], list[int]] = {}
        self.told: list[str] = []
        self.stop = Interruption()
        self.make = make
        self.short = short
        self.fleet = Fleet(
            self.requests, LIMITS, [()] * members, self.build, stop=self.stop, tell=self.told.append, interval=0.0, **options
        )

    def build(self, number: int, requests: Requests, before: Standing, **options: Any) -> Replica:
        stops = StopRules(requests.sampling, [token_device.EOS], token_device.VOCAB, None)
        limits = replace(LIMITS, num_pages=24) if self.short else LIMITS
        lengths = Shortsighted() if self.short else None
        scheduler = Scheduler(requests, limits, stops, lengths, counts=before.scheduled)
        count = before.scheduled.finished + int(requests.num_samples().sum())
        return Replica(scheduler, self.make, depth=2, max_restarts=20, num_samples=count, counts=before.counts, **options)

    def take(self, completions: list[Completion]) -> None:
        for completion in completions:
            key = (completion.row_index, completion.sample_index)
            assert key not in self.done
            self.done[key] = completion.token_ids.tolist()

    def run(self) -> Iterator[None]:
        try:
            for completions in self.fleet.run():
                self.take(completions)
                yield
        finally:
            self.fleet.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


@pytest.mark.parametrize("pause", [0.0, 0.02], ids=["taken at once", "taken slowly"])
def test_samples_and_figures_are_those_of_a_replica_in_this_process(pause, monkeypatch):
    monkeypatch.setattr("tokabatch.runner.member_process.MAX_UNSENT", 1)
    monkeypatch.setattr("tokabatch.runner.member_process.SAMPLES_SENT", 2)
    work = Work()
    for _ in work.run():
        time.sleep(pause)
    here = Work().build(0, work.requests, Standing.before(LIMITS))
    for _ in here.run():
        pass
    assert work.done == EXPECTED
    assert work.fleet.standing().scheduled == here.standing().scheduled
    steps, expected = work.fleet.steps(), here.steps()
    assert len(steps) == len(expected) > 0
    assert all((steps[name] == expected[name]).all() for name in steps.columns if name != "seconds")


def test_samples_are_collected_while_main_is_behind():
    """Steps are not delayed by a pause of main: what they finish goes into one message once there is room."""
    scheduler = SimpleNamespace(done=False, suspected_rows=lambda: np.zeros(0, np.int64))
    outbox: queue.Queue[Any] = queue.Queue(2)
    loop = member_process._Loop(SimpleNamespace(scheduler=scheduler), None, queue.Queue(), outbox, Pace(None), None)
    loop._due = float("inf")
    samples = [SimpleNamespace(number=number) for number in range(5)]
    for sample in samples[:4]:
        loop._finished.append(sample)
        loop._tell()
    assert outbox.qsize() == 2
    outbox.get()
    loop._finished.append(samples[4])
    loop._tell()
    assert [list(message.completions) for message in outbox.queue] == [samples[1:2], samples[2:]]


def test_a_member_gives_by_what_is_left_of_its_running_samples() -> None:
    """Of those that it holds, 100 run and 60 wait; the other has the work of 60."""
    asked: list[int] = []
    for headway in (0.0, 95.0):
        scheduler = SimpleNamespace(done=False, num_running=100, headway=headway, suspected_rows=lambda: np.zeros(0, np.int64))
        replica = SimpleNamespace(scheduler=scheduler, waiting=60, give_back=lambda most: asked.append(most) or [])
        outbox: queue.Queue[Any] = queue.Queue()
        loop = member_process._Loop(replica, None, queue.Queue(), outbox, Pace(None, headway=True), None)
        loop._obey(Share(60.0))
        loop._finished = [SimpleNamespace(), SimpleNamespace()]
        loop._send(None)
        assert [message.headway for message in list(outbox.queue)[1:]] == [headway]
    assert asked == [50, 2]


def test_main_has_the_standings_of_several_members_often_however_seldom_they_are_shown() -> None:
    requests = token_device.make_requests(PROMPTS, [PARAMS])
    paces = [
        Fleet(requests, LIMITS, [()] * members, lambda *_, **__: None, stop=Interruption(), tell=print, interval=10.0)._pace  # pyright: ignore
        for members in (1, 2)
    ]
    assert [pace.standing for pace in paces] == [10.0, member_process.STANDING_SECONDS]
    assert [pace.headway for pace in paces] == [False, True]


@pytest.mark.timeout(30)
def test_a_step_is_not_delayed_by_a_request_for_more_samples():
    """While the queue to main is full, more samples are requested after a later step."""
    stopped, outbox = threading.Event(), queue.Queue(1)

    def step(meanwhile: Callable[[], None]) -> list[Completion]:
        stopped.set()
        outbox.put("full")
        return []

    scheduler = SimpleNamespace(done=False, num_running=0, suspected_rows=lambda: np.zeros(0, np.int64))
    replica = SimpleNamespace(scheduler=scheduler, waiting=0, start=list, step=step)
    loop = member_process._Loop(replica, None, queue.Queue(), outbox, Pace(None), SimpleNamespace(turns=0))
    loop._due = math.inf
    loop._run(stopped)
    assert list(outbox.queue) == ["full"]


def test_another_process_goes_on_where_one_was_killed():
    work = Work(partial(Device, 0.005), max_restarts=3)
    kills = 0
    for _ in work.run():
        if kills < 2 and len(work.done) > 12 * (kills + 1):
            assert work.fleet._members[0].pid is not None
            os.kill(work.fleet._members[0].pid or 0, signal.SIGKILL)
            kills += 1
    assert work.done == EXPECTED
    assert len(work.told) == kills == 2 and "killed by signal 9" in work.told[0]


def test_a_process_that_stands_still_is_killed_and_another_goes_on(monkeypatch):
    monkeypatch.setattr("tokabatch.runner.member_process.BEAT_SECONDS", 0.1)
    work = Work(partial(Device, 0.005, load_seconds=2.0), max_restarts=1, hang_seconds=1.0)
    stopped = False
    for _ in work.run():
        if work.done and not stopped:
            assert work.fleet._members[0].pid is not None
            os.kill(work.fleet._members[0].pid or 0, signal.SIGSTOP)
            stopped = True
    assert work.done == EXPECTED
    assert len(work.told) == 1 and "did not respond" in work.told[0]


def test_a_process_that_stops_in_the_middle_of_a_message_holds_up_no_other_and_is_replaced(monkeypatch):
    stopped, send = multiprocessing.get_context("fork").Value("i", 0), member_process.send_messages

    def stopping(outbox, pipe, alive):
        with stopped.get_lock():
            stopped.value += 1
            first = stopped.value == 1
        if first:
            os.write(pipe.fileno(), struct.pack("!i", 1000) + bytes(10))
            os.kill(os.getpid(), signal.SIGSTOP)
        send(outbox, pipe, alive)

    monkeypatch.setattr(member_process, "send_messages", stopping)
    work = Work(partial(Device, 0.005), 2, max_restarts=1, hang_seconds=4.0)
    looked, longest, finished = time.monotonic(), 0.0, 0
    for _ in work.run():
        now = time.monotonic()
        looked, longest = now, max(longest, now - looked)
        finished = finished if work.told else len(work.done)
    assert work.done == EXPECTED
    assert finished > 0 and longest < 3.0, "before it was killed"
    assert len(work.told) == 1 and "did not respond" in work.told[0]


def test_a_process_that_stands_still_holds_up_nobody_who_sends_to_it(monkeypatch):
    monkeypatch.setattr("tokabatch.runner.member_process.BEAT_SECONDS", 0.1)
    work = Work(partial(Device, 0.005), 2, max_restarts=1, hang_seconds=1.0)
    first = work.fleet._members[0]
    going_on: threading.Timer | None = None
    for _ in work.run():
        if len(work.done) > 4 and first.begun and going_on is None:
            os.kill(first.pid or 0, signal.SIGSTOP)
            # Where nobody else ends this test's wait for it.
            going_on = threading.Timer(20.0, os.kill, (first.pid, signal.SIGCONT))
            going_on.start()
            # More than its pipe holds.
            first.send(Lengths(np.zeros(1 << 20, np.int32), np.zeros(1 << 20, np.bool_)))
    assert going_on is not None
    going_on.cancel()
    assert work.done == EXPECTED
    assert len(work.told) == 1 and "did not respond" in work.told[0]


def test_a_process_that_is_killed_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(Device, "start", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    work = Work(max_restarts=2)
    with pytest.raises(EngineError, match=r"signal 9.*engine\.max_restarts"):
        list(work.run())
    assert len(work.told) == 2


def test_a_fault_of_the_scheduler_is_told_with_its_place(monkeypatch):
    def fail(self: Scheduler, result: StepResult) -> list[Completion]:
        raise AssertionError("the books do not close")

    monkeypatch.setattr(Scheduler, "apply", fail)
    with pytest.raises(EngineError, match=r"(?s)the books do not close.*please report.*Traceback.*in fail"):
        list(Work().run())


def test_what_is_finished_when_the_run_is_stopped_is_handed_over():
    work = Work(partial(Device, 0.005))
    for completions in work.fleet.run():
        work.take(completions)
        if work.done:
            break
    before = dict(work.done)
    work.take(work.fleet.stop())
    work.fleet.close()
    assert before.items() <= work.done.items() <= EXPECTED.items() and len(work.done) < len(EXPECTED)
    assert work.fleet.standing().scheduled.finished == len(work.done)


def test_members_of_a_large_fleet_keep_finished_samples_until_there_are_more(monkeypatch):
    monkeypatch.setattr("tokabatch.runner.fleet.MESSAGE_SECONDS", 1000.0)
    whole = Work(partial(Device, 0.002))
    batches = [len(whole.done) for _ in whole.run()]
    assert whole.done == EXPECTED and set(batches) == {0, len(EXPECTED)}, "all in one message, once nothing is left to run"
    steps, collect = multiprocessing.get_context("fork").Value("i", 0), Device.collect

    def counted(device: Device) -> StepResult:
        steps.value += 1
        return collect(device)

    monkeypatch.setattr(Device, "collect", counted)
    stopped = Work(partial(Device, 0.01))
    for completions in stopped.fleet.run():
        assert not completions
        if steps.value > 1.2 * PARAMS.max_tokens + 4:
            break
    stopped.take(stopped.fleet.stop())
    stopped.fleet.close()
    assert 0 < len(stopped.done) < len(EXPECTED) and stopped.done.items() <= EXPECTED.items()


def test_a_stop_breaks_into_loading():
    work = Work(partial(Device, load_seconds=60.0))
    began = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: work.stop.request(75))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(Stopped):
        list(work.run())
    assert not len(work.fleet.stop()) and time.monotonic() - began < 30.0


@pytest.mark.parametrize("short", [False, True], ids=["roomy", "preempting"])
@pytest.mark.parametrize("members", [2, 3])
def test_several_members_share_the_work_and_each_sample_comes_once(members, short):
    work = Work(partial(Device, 0.003, num_pages=24 if short else 200), members, short=short)
    for _ in work.run():
        pass
    assert work.done == EXPECTED
    assert (work.fleet.standing().scheduled.preemptions > 0) == short
    shares, standing = work.fleet.shares(), work.fleet.standing()
    assert sum(share.samples for share in shares) == standing.scheduled.finished == len(EXPECTED)
    assert all(share.samples > 0 for share in shares)
    assert standing.scheduled.finished_prompts == len(PROMPTS)
    steps = work.fleet.steps()
    finished = np.bincount(steps["replica"].astype(int), steps["finished"], members)
    assert finished.tolist() == [share.samples for share in shares]


def test_what_is_drawn_already_is_not_drawn_again():
    flags = np.random.default_rng(3).random(len(EXPECTED)) < 0.5
    drawn = Drawn(np.arange(len(PROMPTS) + 1) * PARAMS.n, flags)
    work = Work(members=2, drawn=drawn)
    for _ in work.run():
        pass
    assert work.done == {key: EXPECTED[key] for place, key in enumerate(sorted(EXPECTED)) if not flags[place]}


def test_a_fast_member_takes_over_what_a_slow_one_has_not_begun():
    made = multiprocessing.get_context("fork").Value("i", 0)

    def device() -> Device:
        with made.get_lock():
            made.value += 1
            return Device(0.001 if made.value > 1 else 0.05)

    work = Work(device, 2)
    for _ in work.run():
        pass
    assert work.done == EXPECTED
    assert max(share.samples for share in work.fleet.shares()) > 0.6 * len(EXPECTED)


@pytest.mark.parametrize("seed", range(3))
def test_members_killed_at_random_lose_and_double_nothing(seed):
    work, chance = Work(partial(Device, 0.004), 3, max_restarts=100), random.Random(seed)
    running, struck = list[int](), set[int]()
    for _ in work.run():
        running = [member.pid for member in work.fleet._members if member.pid is not None]
        # Each process once, however long its end takes.
        if len(work.done) > 4 * (len(struck) + 1) and len(struck) < 8 and (pids := [p for p in running if p not in struck]):
            pid = chance.choice(pids)
            os.kill(pid, signal.SIGKILL)
            struck.add(pid)
    assert work.done == EXPECTED
    # One that holds no sample any more may end with the run, unseen.
    assert work.fleet.standing().counts.restarts["scheduler"] == len(struck.difference(running))


def test_a_member_that_is_lost_again_and_again_is_done_without():
    made = multiprocessing.get_context("fork").Value("i", 0)

    class Doomed(Device):
        def start(self) -> None:
            with made.get_lock():
                made.value += 1
                first = made.value == 1
            if not first:
                os.kill(os.getpid(), signal.SIGKILL)

    work = Work(partial(Doomed, 0.01), 2, max_restarts=1)
    for _ in work.run():
        pass
    assert work.done == EXPECTED
    assert any("continues with 1 of 2 replicas" in text for text in work.told)


def test_a_row_that_kills_workers_kills_few_over_the_whole_fleet():
    """Its samples are divided between the members until one of these suspects it."""
    crashes = multiprocessing.get_context("fork").Value("i", 0)
    poison = 3

    class Poisoned(Device):
        def submit(self, step: StepBatch) -> None:
            if poison in step.inits.row:
                with crashes.get_lock():
                    crashes.value += 1
                raise WorkerLost("the worker process was killed", "killed")
            super().submit(step)

    work = Work(partial(Poisoned, 0.002), 2, max_restarts=20)
    errors: list[Completion] = []
    try:
        for completions in work.fleet.run():
            errors += [completion for completion in completions if completion.error_code is not None]
            work.take([completion for completion in completions if completion.error_code is None])
    finally:
        work.fleet.close()
    assert work.done == {key: tokens for key, tokens in EXPECTED.items() if key[0] != poison}
    assert sorted((c.row_index, c.sample_index, c.error_code) for c in errors) == [
        (poison, sample, "worker_crash") for sample in range(PARAMS.n)
    ]
    # Twice together, a halving for each power of two, twice alone; and once more for the other member.
    assert crashes.value <= 2 + 3 + 2 + 2


def test_later_samples_of_a_row_that_is_suspected_go_where_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = np.full(len(PROMPTS), 2, np.int64)
    requests = token_device.make_requests(PROMPTS, [PARAMS])
    fleet = Fleet(requests, LIMITS, [(), ()], lambda *_, **__: None, stop=Interruption(), tell=print, begun=begun)  # pyright: ignore[reportArgumentType]
    gathered: list[int] = []
    monkeypatch.setattr(Fleet, "_gather", lambda self, member: gathered.append(member.number))
    fleet._gathering = {fleet._ledger.prompts([3])[0]: 1}  # pyright: ignore[reportPrivateUsage]
    fleet.follow([RowLimits(2, 4, PARAMS.n)])
    assert not gathered
    fleet.follow([RowLimits(3, 4, PARAMS.n), RowLimits(4, 4, PARAMS.n)])
    assert gathered == [1]


def test_samples_of_suspects_are_withdrawn_from_all_others_whatever_these_were_told_before() -> None:
    requests = token_device.make_requests(PROMPTS, [PARAMS])
    fleet = Fleet(requests, LIMITS, [(), (), ()], lambda *_, **__: None, stop=Interruption(), tell=print)  # pyright: ignore[reportArgumentType]
    sent: list[list[Any]] = [[], [], []]
    for member, orders in zip(fleet._members, sent, strict=True):
        process: Any = SimpleNamespace(send=orders.append, close=lambda seconds: None, pipe=object())
        member.begin(process)

    def part(prompt: int, first: int, stop: int) -> Part:
        return Part(*(np.array([number], np.int32) for number in (prompt, first, stop)))

    suspected, other = fleet._ledger.prompts([3, 4]).tolist()
    first, second, third = fleet._members
    for member, held in ((first, part(suspected, 0, 2)), (second, part(suspected, 2, 4)), (second, part(other, 0, 6))):
        fleet._ledger.take_over(member.number, held)
    fleet._ledger.take_over(third.number, part(suspected, 4, 6))
    second.send(Share(2))
    fleet._take(first, Suspects(np.array([3])))
    fleet._take(first, Suspects(np.array([3])))
    for orders in sent[1:]:
        assert [order.rows.tolist() for order in orders if isinstance(order, Withdraw)] == [[3]], "once"
    # The answer to what it was asked before.
    fleet._take(second, Given(part(other, 3, 6)))
    fleet._take(second, Given(part(suspected, 2, 4)))
    # Another's are free where it is lost, and go to no one else.
    fleet._replace(third, ReplicaLost("gone"))
    given = [unpacked(order) for order in sent[0] if isinstance(order, bytes)]
    assert [each.first.tolist() for each in given] == [[2], [4]] and fleet._ledger.held(first.number) == PARAMS.n


class Placed:
    """A process that begins once there is a place for it, `after` so many seconds, as on a cluster."""

    def __init__(self, after: float, start: Callable[[], Fork]) -> None:
        self._at, self._start = time.monotonic() + after, start
        self._process: Fork | None = None
        self.waiting, self._other = multiprocessing.Pipe()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)

    @property
    def pipe(self) -> Any:
        return self.waiting if self._process is None else self._process.pipe

    def check(self) -> bool:
        if self._process is None and time.monotonic() > self._at:
            self._process = self._start()
        return self._process is not None

    def hang_up(self) -> None:
        if self._process is not None:
            self._process.hang_up()

    def close(self, seconds: float) -> None:
        for each in (self.waiting, self._other):
            each.close()
        if self._process is not None:
            self._process.close(seconds)


@pytest.mark.parametrize("after", [0.3, math.inf])
def test_nothing_is_held_back_for_a_member_that_has_no_place_yet(after):
    work = Work(partial(Device, 0.01), 2)
    fleet = work.fleet

    def launch(number: int, build: Any, ledger: Any, before: Standing, pace: Pace) -> Placed:
        def start() -> Fork:
            return Fork(fleet._members[number], build, Part.joined([]), ledger, pace, lambda: None)

        return Placed(after if number else 0.0, start)

    fleet._launch = launch
    for _ in work.run():
        pass
    first, second = fleet._members
    assert work.done == EXPECTED and work.told == []
    assert first.finished + second.finished == len(EXPECTED)
    if after == math.inf:
        assert first.parts == 1, "all that there was at once"
    else:
        assert second.finished > 0
