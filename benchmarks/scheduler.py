"""CPU cost of scheduling, without a model: python -m benchmarks.scheduler [--running 256 2048 8192]

A scripted device answers every step at once with random tokens; samples end by themselves with a mean of 200 tokens (at
most 400). Timed are `schedule` (page growth, grouping and admission included) and `apply` in the steady state, the running
limit full. The workloads: `chat` has one sample a prompt and shares nothing, the most admissions and the largest forests;
`chat 2` to `chat 8` are the same with so many samples a prompt; `repeated` has 512 samples for each of many prompts behind one
900-token header; `experiment` has 64 samples of 51 tokens on average behind each of many prompts of 1,380 tokens with a header
of 1,312, ended by a stop string of several tokens, as GSM8K with eight worked examples (`benchmarks.gpu.real`). All of them
take their steps in turn, so that whatever else the machine does strikes all alike. Times are CPU time of the scheduling thread;
`renewal` is the longest renewal of the length model among these steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Int32
from tokabatch.scheduling.contracts import Requests, SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules, TokenText

VOCAB, EOS, PAGE = 128_256, 128_001, 16
MEAN_OUTPUT, MAX_OUTPUT = 200, 400
MEAN_ANSWER = 51
STOP, STOP_TOKENS = "\nQuestion:", (1, 2, 3)
PIECES = ["x", "\n", "Question", ":", *(" word" for _ in range(4, VOCAB))]


@dataclass(frozen=True)
class Timing:
    running: float
    schedule_ms: float
    apply_ms: float
    median_ms: float
    """Of both together."""
    p99_ms: float
    renewal_ms: float


WORKLOADS = ("chat", "chat 2", "chat 4", "chat 8", "repeated", "experiment")


def requests_of(workload: str, running: int) -> Requests:
    rng = np.random.default_rng(0)
    if workload.startswith("chat"):
        n = int(workload.removeprefix("chat") or 1)
        count = 6 * running // n
        length = np.clip(rng.lognormal(np.log(180), 0.6, count), 16, 1024).astype(np.int32)
        lcp = np.zeros(count, np.int32)
    elif workload == "repeated":
        count, n = max(8, 6 * running // 512), 512
        length = np.full(count, 1000, np.int32)
        lcp = np.full(count, 900, np.int32)
        lcp[0] = 0
    else:
        count, n = max(8, 12 * running // 64), 64
        length = rng.integers(1340, 1420, count, dtype=np.int32)
        lcp = np.full(count, 1312, np.int32)
        lcp[0] = 0
    stop = (STOP,) if workload == "experiment" else ()
    sampling = (SamplingParams(n=n, max_tokens=MAX_OUTPUT, stop=stop),)
    return Requests(
        row_index=np.arange(count),
        tokens=rng.integers(0, VOCAB, int(length.sum()), dtype=np.int32),
        start=(np.cumsum(length) - length).astype(np.int64),
        length=length,
        lcp=lcp,
        params=np.zeros(count, np.int32),
        sampling=sampling,
    )


class Device:
    """Draws at random at once. With `strings` a sample ends with the tokens of `STOP`, else with the end token."""

    def __init__(self, running: int, *, strings: bool) -> None:
        self._rng = np.random.default_rng(1)
        self._strings = strings
        self._ending = np.zeros(running, np.int64)
        """Tokens of `STOP` that the sample in each slot has drawn."""

    def answer(self, step: StepBatch) -> StepResult:
        slots = step.run_slot[step.run_samples]
        token = self._rng.integers(len(STOP_TOKENS) + 1, EOS, len(slots))
        if not self._strings:
            return StepResult.of_tokens(step.index, np.where(self._ends(slots, MEAN_OUTPUT), EOS, token).astype(np.int32))
        self._ending[step.inits.slot] = 0
        ending = self._ending[slots]
        ending += (ending > 0) | self._ends(slots, MEAN_ANSWER - len(STOP_TOKENS))
        self._ending[slots] = ending
        stop = np.array((0, *STOP_TOKENS))[np.minimum(ending, len(STOP_TOKENS))]
        return StepResult.of_tokens(step.index, np.where(ending > 0, stop, token).astype(np.int32))

    def _ends(self, slots: Int32, mean: int) -> Bool:
        return self._rng.random(len(slots)) < 1 / mean


def decode(batch: Sequence[Sequence[int]]) -> list[str]:
    """As a tokenizer of these pieces would."""
    return ["".join(map(PIECES.__getitem__, tokens)) for tokens in batch]


class Replica:
    """A scheduler of one workload, and what its steps have taken."""

    def __init__(self, workload: str, running: int) -> None:
        requests = requests_of(workload, running)
        limits = SchedulerLimits(
            page_size=PAGE,
            num_pages=running * (1420 + MAX_OUTPUT) // PAGE,
            max_running=running,
            max_step_tokens=running + max(8192, 4 * running),
            max_pages_per_sequence=-(-(1420 + MAX_OUTPUT) // PAGE),
            grouping=GroupingLimits(4, 4),
        )
        stops = StopRules(requests.sampling, [EOS], VOCAB, TokenText(PIECES, decode, {}))
        self.scheduler = Scheduler(requests, limits, stops)
        self._device = Device(running, strings=workload == "experiment")
        self._schedule, self._apply, self._active = list[float](), list[float](), list[int]()
        self._renewals = timed_renewals(self.scheduler)

    @property
    def steady(self) -> bool:
        """The running limit has been full for a mean output length."""
        return self.scheduler.counts.steps > MEAN_OUTPUT

    def step(self) -> None:
        """One step; it counts once the state is steady."""
        begin = time.thread_time()
        batch = self.scheduler.schedule()
        middle = time.thread_time()
        assert batch is not None, "the workload ran out before the measurement did"
        result = self._device.answer(batch)
        resume = time.thread_time()
        self.scheduler.apply(result)
        end = time.thread_time()
        if self.steady:
            self._schedule.append(middle - begin)
            self._apply.append(end - resume)
            self._active.append(self.scheduler.num_running)
        else:
            self._renewals.clear()

    def timing(self) -> Timing:
        schedule, apply = np.array(self._schedule), np.array(self._apply)
        return Timing(
            float(np.mean(self._active)),
            float(np.mean(schedule)) * 1e3,
            float(np.mean(apply)) * 1e3,
            float(np.median(schedule + apply)) * 1e3,
            float(np.quantile(schedule + apply, 0.99)) * 1e3,
            max(self._renewals, default=0.0) * 1e3,
        )


def measure(workloads: Sequence[str], running: int, steps: int) -> list[Timing]:
    """All of them, step by step in turn once each is steady, so that whatever else the machine does strikes all alike."""
    replicas = [Replica(workload, running) for workload in workloads]
    for replica in replicas:
        while not replica.steady:
            replica.step()
    for _ in range(steps):
        for replica in replicas:
            replica.step()
    return [replica.timing() for replica in replicas]


def timed_renewals(scheduler: Scheduler) -> list[float]:
    """The seconds that each renewal of the length model takes from now on."""
    seconds: list[float] = []
    lengths = scheduler._lengths  # pyright: ignore[reportPrivateUsage]
    refresh = lengths.refresh

    def timed() -> bool:
        begin = time.thread_time()
        renewed = refresh()
        if renewed:
            seconds.append(time.thread_time() - begin)
        return renewed

    lengths.refresh = timed
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workload", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    args = parser.parse_args()
    heads = f"{'schedule':>9} {'apply':>7} {'total':>7} {'median':>7} {'p99':>7} {'renewal':>8}  ms a step   us/sequence"
    print(f"{'workload':10} {'running':>8} {heads}")
    for running in args.running:
        for workload, t in zip(args.workload, measure(args.workload, running, args.steps), strict=True):
            total = t.schedule_ms + t.apply_ms
            print(
                f"{workload:10} {t.running:8.0f} {t.schedule_ms:9.3f} {t.apply_ms:7.3f} {total:7.3f} {t.median_ms:7.3f} "
                f"{t.p99_ms:7.3f} {t.renewal_ms:8.3f}  {total * 1e3 / t.running:22.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
