"""Run one job through `tokabatch.run` in this process and write what it took: the child process of `__main__`.

    python -m benchmarks.gpu.whole_pass JOB.json FIGURES.json [KEY=VALUE ...]

The clock of the whole pass runs from the first step to the last finished output on disk, so that reading, loading and warming
up are separate. The steady state is the longest stretch in which at least nine tenths of the most running samples run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.gpu.cpu_shares import CpuShares
from tokabatch import Job
from tokabatch.output.folder import OutputFolder
from tokabatch.output.steps import elapsed, read_steps
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.report.render import plain
from tokabatch.report.summary import RunSummary, run_sections
from tokabatch.runner.run import run

STEADY_SHARE = 0.9
HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Steady:
    """The steady state: seconds, output tokens a second, samples running on average, median step."""

    seconds: float
    rate: float
    running: float
    median_step_ms: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What one pass took. `start_seconds` is from the start of the process to the first step, of it `read_seconds` for the
    input and `load_seconds` for weights, cache and warm-up; `loop_cpu_seconds` is the CPU time of scheduling and recording
    over the steps, `schedule_seconds` of it deciding and applying; `launch_cpu_seconds` is that of the worker's launches;
    `write_seconds` is from the last result to the end; `num_pages` are the KV pages of all replicas."""

    device: str
    start_seconds: float
    read_seconds: float
    load_seconds: float
    whole_seconds: float
    write_seconds: float
    output_tokens: int
    prompt_tokens: int
    prefilled_tokens: int
    steps: int
    step_seconds: float
    """The time of the steps, of several replicas the mean: without the seconds by which one started before another."""
    max_running: int
    num_pages: int
    first_steps_ms: tuple[float, ...]
    loop_cpu_seconds: float
    schedule_seconds: float
    launch_cpu_seconds: float
    preemptions: int
    exit_code: int
    steady: Steady | None

    @property
    def rate(self) -> float:
        """Output tokens a second over the whole pass."""
        return self.output_tokens / self.whole_seconds

    @staticmethod
    def load(file: Path) -> Figures:
        values: dict[str, Any] = json.loads(file.read_text())
        steady = values.pop("steady")
        values["first_steps_ms"] = tuple(values["first_steps_ms"])
        return Figures(**values, steady=None if steady is None else Steady(**steady))


class Watch(NullProgress):
    """A display that shows little and remembers everything."""

    interval = 0.1

    def __init__(self, stop_file: Path | None) -> None:
        self._stop_file = stop_file
        self.begun: float | None = None
        """When the run began, by this process's clock; known with the first snapshot."""
        self.cpu = CpuShares()
        self.snapshots: list[ProgressSnapshot] = []
        self.results: list[float] = []
        """Seconds since the run began at which each step's result was in; from the run's record, once it has ended."""
        self.loop_cpu_seconds = 0.0
        self._cpu_begin: float | None = None
        self._next_line = 0.0

    def update(self, snapshot: ProgressSnapshot) -> None:
        if self.begun is None:
            self.begun = time.perf_counter() - snapshot.elapsed
        self.snapshots.append(snapshot)
        if snapshot.phase == "generating":
            self.cpu.look()
        if snapshot.elapsed >= self._next_line:
            self._next_line = snapshot.elapsed + HEARTBEAT_SECONDS
            print(
                f"    {snapshot.elapsed:6.1f} s {snapshot.phase}: {snapshot.running:,} running, "
                f"{snapshot.samples_done:,} samples done, {snapshot.tokens_out:,} tokens",
                flush=True,
            )

    def message(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def after_step(self) -> bool:
        """Whether to stop; `run` calls it whenever samples may have finished, and while it reads."""
        if not self.snapshots or self.snapshots[-1].phase != "generating":
            return False
        now = time.thread_time()
        self._cpu_begin = now if self._cpu_begin is None else self._cpu_begin
        self.loop_cpu_seconds = now - self._cpu_begin
        return self._stop_file is not None and self._stop_file.exists()

    def steady(self) -> Steady | None:
        """None where the run was too short to have one."""
        points = [s for s in self.snapshots if s.phase == "generating"]
        most = max((s.running for s in points), default=0)
        stretches: list[list[ProgressSnapshot]] = [[]]
        for point in points:
            if point.running >= STEADY_SHARE * most:
                stretches[-1].append(point)
            else:
                stretches.append([])
        longest = max(stretches, key=lambda stretch: stretch[-1].elapsed - stretch[0].elapsed if stretch else 0.0)
        if len(longest) < 3:
            return None
        first, last = longest[0], longest[-1]
        inside = [at for at in self.results if first.elapsed <= at <= last.elapsed]
        steps = [1e3 * (later - at) for at, later in pairwise(inside)]
        seconds = last.elapsed - first.elapsed
        return Steady(
            seconds=seconds,
            rate=(last.tokens_out - first.tokens_out) / seconds,
            running=statistics.fmean(point.running for point in longest),
            median_step_ms=statistics.median(steps) if steps else seconds * 1e3,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("figures", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="job keys to change")
    parser.add_argument("--stop-file", type=Path, help="stop after the step at which this file is there")
    arguments = parser.parse_args()
    watch = Watch(arguments.stop_file)
    job = Job.load(json.loads(arguments.job.read_text()), *arguments.overrides)
    summary = run(job, watch, should_stop=watch.after_step)
    steps = read_steps(OutputFolder(Path(job.output.path)))
    watch.results = [] if steps is None else (summary.load_seconds + np.sort(elapsed(steps))).tolist()
    print(plain([section for section in run_sections(summary) if section.title == "Replicas"]), flush=True)
    print(f"  CPU           {watch.cpu.describe()}", flush=True)
    age = time.time() - psutil.Process().create_time() - (time.perf_counter() - (watch.begun or 0.0))
    figures = measured(watch, summary, age)
    arguments.figures.write_text(json.dumps(asdict(figures), indent=2))


def measured(watch: Watch, summary: RunSummary, age: float) -> Figures:
    """`age` is the process's when the run began."""
    loading = next((s.elapsed for s in watch.snapshots if s.phase != "reading"), summary.load_seconds)
    times = [summary.load_seconds, *watch.results[:3]]
    return Figures(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        start_seconds=age + summary.load_seconds,
        read_seconds=loading,
        load_seconds=summary.load_seconds - loading,
        whole_seconds=summary.work_seconds,
        write_seconds=summary.seconds - watch.results[-1] if watch.results else 0.0,
        output_tokens=summary.output_tokens,
        prompt_tokens=summary.prompt_tokens,
        prefilled_tokens=summary.prefilled_tokens,
        steps=summary.steps,
        step_seconds=summary.step_seconds,
        max_running=max((s.running for s in watch.snapshots), default=0),
        num_pages=summary.num_pages,
        first_steps_ms=tuple(1e3 * (later - at) for at, later in pairwise(times)),
        # On a GPU the scheduler has a process of its own.
        loop_cpu_seconds=watch.loop_cpu_seconds + (summary.host_seconds if torch.cuda.is_available() else 0.0),
        schedule_seconds=summary.host_seconds,
        launch_cpu_seconds=summary.launch_seconds,
        preemptions=summary.preemptions,
        exit_code=summary.exit_code,
        steady=watch.steady(),
    )


if __name__ == "__main__":
    main()
