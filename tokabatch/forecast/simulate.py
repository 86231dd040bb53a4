"""Simulate a run: the real scheduler, or several of a fleet, on devices that compute nothing, with seconds from a cost
model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from tokabatch.forecast.assumed_lengths import Lengths
from tokabatch.forecast.step_log import StepLog, Steps, StepState, by_time, tail_seconds
from tokabatch.forecast.step_work import Number, StepWork, measure_work
from tokabatch.scheduling.contracts import Completion, Requests, StepBatch, StepResult
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.lengths.predictor import LengthPredictor
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

STOP, GO_ON = 1, 0
"""The two tokens that the simulated device produces."""


class SimulatedDevice:
    """Computes nothing: answers steps, in order, with tokens that end each sample with `STOP` at its length, which depends only
    on its row and number."""

    def __init__(self, requests: Requests, lengths: Lengths, num_slots: int) -> None:
        self._lengths = lengths
        self._prompt_length = np.zeros(int(requests.row_index.max(initial=0)) + 1, np.int32)
        self._prompt_length[requests.row_index] = requests.length
        self._end = np.zeros(num_slots, np.int64)
        """For each slot, the computed positions at which its sample draws its last token."""

    def run(self, step: StepBatch) -> StepResult:
        inits = step.inits
        if len(inits.slot):
            length = self._lengths(inits.row, inits.sample).astype(np.int64)
            self._end[inits.slot] = self._prompt_length[inits.row] + length - 1
        sampled = np.flatnonzero(step.run_samples)
        ended = step.run_start[sampled] + step.run_length[sampled] >= self._end[step.run_slot[sampled]]
        return StepResult.of_tokens(step.index, np.where(ended, STOP, GO_ON).astype(np.int32))


@dataclass(frozen=True, slots=True)
class Simulation:
    """The result of a simulated run. `steps` holds every step with its predicted seconds."""

    steps: Steps
    counts: SchedulerCounts
    num_pages: int
    """Of each replica."""
    seconds: float
    busy: tuple[float, ...]
    """Seconds until each replica had nothing left to do."""

    @property
    def output_tokens_per_second(self) -> float:
        return self.counts.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def kv_use(self) -> float:
        """Mean share of the pages in use, weighted by time, while samples wait to be admitted."""
        busy = self.steps["waiting"] > 0
        seconds = self.steps["seconds"] * busy
        return float((self.steps["pages"] * seconds).sum() / (seconds.sum() * self.num_pages)) if busy.any() else 0.0

    @property
    def tail_seconds(self) -> float:
        """Of one replica, the mean over several."""
        return tail_seconds(self.steps) / len(self.busy)

    @property
    def waste(self) -> float:
        """Share of all computed tokens that were recomputed after preemptions."""
        counts = self.counts
        return counts.recomputed_tokens / max(counts.prefilled_tokens + counts.output_tokens, 1)

    @property
    def waited(self) -> float:
        """Steps that running samples skipped because pages were missing, per output token."""
        return self.counts.waited_steps / max(self.counts.output_tokens, 1)


class Ledger(Protocol):
    """Which member has which samples of a plan: the part of a run's own ledger (`runner.ledger`) that a simulated fleet
    needs."""

    plan: Requests
    left: int

    @property
    def has_free(self) -> bool: ...

    def next_run(self, member: int, members: int) -> Any: ...

    def work(self, member: int) -> float: ...

    def note_headway(self, member: int, headway: float) -> None: ...

    def part(self, requests: Requests) -> Any: ...

    def take_over(self, member: int, part: Any) -> None: ...

    def finish(self, member: int, completions: Sequence[Completion]) -> None: ...


@dataclass(frozen=True, slots=True)
class FleetRules:
    """How the `members` of a run share its plan. `ledger` makes the ledger; `wants_more` says whether a member with these
    numbers of waiting and running samples requests more; `to_give` how many samples a member gives away, from its work, the
    number of samples waiting there, and the work of the receiver. `starts` are the seconds after which each member has
    loaded its model, shape [members]; None is 0 for all."""

    members: int
    ledger: Callable[[Requests], Ledger]
    wants_more: Callable[[int, int], bool]
    to_give: Callable[[float, int, float], int]
    starts: Sequence[float] | None = None


class _Member:
    """A simulated replica, with a clock of its own."""

    def __init__(
        self, requests: Requests, plan: Requests, limits: SchedulerLimits, lengths: Lengths, predictor: LengthPredictor | None
    ) -> None:
        rules = StopRules(requests.sampling, [STOP], STOP + 1, None)
        self.scheduler = Scheduler(requests, limits, rules, predictor)
        self.log = StepLog()
        self.seconds = 0.0
        self.left = int(requests.num_samples().sum())
        """Samples that it has and has not finished."""
        self._device = SimulatedDevice(plan, lengths, limits.max_running)
        self._depth = limits.stages + (limits.stages > 1)
        self._pending: deque[tuple[StepWork, StepState, StepResult]] = deque()
        self.left -= len(self.scheduler.settle_pages(limits.num_pages))

    @property
    def waiting(self) -> int:
        return self.left - self.scheduler.num_running

    def extend(self, requests: Requests) -> list[Completion]:
        """Add samples; return those that do not fit the cache as errors."""
        self.left += int(requests.num_samples().sum())
        refused = self.scheduler.extend(requests)
        self.left -= len(refused)
        return refused

    def give_back(self, most: int) -> Requests | None:
        """Give samples back, as the scheduler does."""
        given = self.scheduler.give_back(most)
        self.left -= 0 if given is None else int(given.num_samples().sum())
        return given

    def step(self, cost: Callable[[StepWork], Number], waiting_elsewhere: int) -> list[Completion]:
        """Apply the oldest step in flight, once there are as many as there are stages."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        while scheduler.num_in_flight < self._depth and (step := scheduler.schedule()) is not None:
            running, pages, work = scheduler.num_running, scheduler.kv.pool.num_used, measure_work(step, limits.page_size)
            waiting = self.left - running + waiting_elsewhere
            state = StepState(float(cost(work)), running, waiting, pages, limits.num_pages, 0)
            self._pending.append((work, state, self._device.run(step)))
        assert self._pending, "the scheduler is stuck"
        work, state, result = self._pending.popleft()
        completions = scheduler.apply(result)
        self.left -= len(completions)
        self.seconds += state.seconds
        self.log.add(work, replace(state, finished=len(completions)))
        return completions


def simulate(
    requests: Requests,
    limits: SchedulerLimits,
    cost: Callable[[StepWork], Number],
    lengths: Lengths,
    predictor: LengthPredictor | None = None,
    fleet: FleetRules | None = None,
    on_finished: Callable[[int], None] = lambda finished: None,
) -> Simulation:
    """Run the whole workload. The tokens of `requests` are read, but their values do not matter; `predictor` replaces the
    scheduler's own prediction of lengths. `limits` and `cost` are those of a replica, or of each member of a `fleet`. With
    several pipeline stages, `cost` is that of one stage. `on_finished` is called at each step with the number of samples that
    it finished."""
    # The device's stop token represents whatever ends a sample; samples of given length are left as they are.
    sampling = (
        replace(params, stop=(), stop_token_ids=(), ignore_eos=params.has_given_length, logprobs=None)
        for params in requests.sampling
    )
    requests = replace(requests, sampling=tuple(sampling))
    if fleet is None or fleet.members == 1:
        member = _Member(requests, requests, limits, lengths, predictor)
        while not member.scheduler.done:
            on_finished(len(member.step(cost, 0)))
        return _simulation([member], limits)
    ledger = fleet.ledger(requests)
    nothing = ledger.plan.take(np.zeros(0, np.int64))
    members = [_Member(nothing, requests, limits, lengths, predictor) for _ in range(fleet.members)]
    for number, seconds in enumerate(fleet.starts or ()):
        members[number].seconds = seconds
    for number in range(len(members)):
        # Each loads its model with a first run.
        _feed(number, members, ledger, fleet.to_give)
    at_work = dict(enumerate(members))
    while at_work:
        # The replica whose clock is furthest behind takes the next step.
        number = min(at_work, key=lambda each: at_work[each].seconds)
        member = at_work[number]
        if fleet.wants_more(member.waiting, member.scheduler.num_running):
            _feed(number, members, ledger, fleet.to_give)
        if member.scheduler.done:
            del at_work[number]
            continue
        running = sum(each.scheduler.num_running for each in members if each is not member)
        elsewhere = ledger.left - member.left - running
        finished = member.step(cost, elsewhere)
        ledger.finish(number, finished)
        ledger.note_headway(number, member.scheduler.headway)
        on_finished(len(finished))
    return _simulation(members, limits)


def _feed(number: int, members: Sequence[_Member], ledger: Ledger, to_give: Callable[[float, int, float], int]) -> None:
    """Give a member the next part of the plan, or samples that the fullest other member has not begun."""
    member = members[number]
    run = ledger.next_run(number, len(members))
    if run is not None:
        given = ledger.plan.part(run.prompts, run.first, run.stop)
    elif not ledger.has_free:
        others = (each for each in range(len(members)) if each != number)
        fullest = max(others, key=lambda each: (members[each].waiting > 0, ledger.work(each)))
        most = to_give(ledger.work(fullest), members[fullest].waiting, ledger.work(number))
        given = members[fullest].give_back(most) if most > 0 else None
        if given is not None:
            ledger.take_over(number, ledger.part(given))
    else:
        given = None
    if given is not None:
        ledger.finish(number, member.extend(given))


def _simulation(members: Sequence[_Member], limits: SchedulerLimits) -> Simulation:
    """Combine what the members did, with their steps in order of time."""
    steps = by_time([member.log.steps() for member in members])
    counts = SchedulerCounts()
    for field in fields(SchedulerCounts):
        setattr(counts, field.name, sum(getattr(member.scheduler.counts, field.name) for member in members))
    seconds = max(member.seconds for member in members)
    return Simulation(steps, counts, limits.num_pages, seconds, tuple(member.seconds for member in members))
