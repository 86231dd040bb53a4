"""Launches steps on a worker and measures: the CPU time that each launch takes and, where the job has `trace`, what the device
does during a few steps (torch's profiler, as a Chrome trace).

Independent of process boundaries; the executors launch through it.
"""

from __future__ import annotations

import os
import time
import warnings

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import Launched, TraceSpec, Worker, WorkerSpec
from tokabatch.parallel.mesh import Mesh
from tokabatch.scheduling.contracts import StepBatch

WARM_UP_STEPS = 4
"""Steps that are traced and discarded: starting the profiler stalls the first of them."""


class Launcher:
    """Steps are launched in the order given, from one thread."""

    def __init__(self, worker: Worker, spec: TraceSpec | None, device: str) -> None:
        self._worker = worker
        self._trace = None if spec is None else StepTrace(spec, device)

    @classmethod
    def build(cls, spec: WorkerSpec) -> Launcher:
        """Build the worker that the spec describes, or the one rank of it, which meets the others first. Raises what
        `Worker.build` does."""
        mesh = spec.place and Mesh.join(spec.place, torch.device(spec.device))
        # One file: that of the first rank.
        traces = mesh is None or mesh.rank == 0
        return cls(Worker.build(spec, mesh), spec.trace if traces else None, spec.device)

    @property
    def sizes(self) -> ReplicaSizes:
        """The sizes that the worker settled."""
        return self._worker.sizes

    def launch(self, step: StepBatch) -> Launched:
        """Queue one step on the device. The time is the calling thread's, the profiler's work left out."""
        if self._trace is not None:
            self._trace.before(step.index)
        begin = time.thread_time()
        with record_function(f"step {step.index}"):
            launched = self._worker.launch(step)
        launched.launch_seconds = time.thread_time() - begin
        return launched

    def make_ahead(self) -> None:
        """See `Worker`."""
        self._worker.make_ahead()

    def close(self) -> None:
        """Writes the trace where the steps ended before it was complete."""
        if self._trace is not None:
            self._trace.finish()


class StepTrace:
    """Records steps `start` to `start + steps - 1`, counted from 1 as steps are, and writes the trace whole or not at all.

    On a GPU only the device's work is recorded: to record the host's operators as well would slow launching so much that the
    device waited for it.
    """

    def __init__(self, spec: TraceSpec, device: str) -> None:
        self._spec = spec
        activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        self._warm_up = min(WARM_UP_STEPS, spec.start - 1)
        with warnings.catch_warnings():
            # A trace from step 1 on has no warm-up; the job set that.
            warnings.simplefilter("ignore", UserWarning)
            steps = schedule(wait=0, warmup=self._warm_up, active=spec.steps, repeat=1)
        self._tracer = profile(activities=[activity], schedule=steps, on_trace_ready=self._write)
        self._running = False
        self._finished = False

    def before(self, index: int) -> None:
        """Start the trace when step `index` is due, or advance it; call this before each step is launched."""
        if self._finished:
            return
        if self._running:
            self._tracer.step()
        elif index >= self._spec.start - self._warm_up:
            self._tracer.start()
            self._running = True

    def finish(self) -> None:
        """Ends the recording; what has been recorded is written."""
        if self._running and not self._finished:
            self._tracer.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._finished = True
        target = self._spec.path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}")
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, target)
