"""Launches steps on a worker, measures the CPU time of each launch and, if the job has `trace`, records a few steps with
torch's profiler as a Chrome trace.

The executors launch through it; it is independent of process boundaries.
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
    """A worker with its measurements. Call it from one thread; steps are launched in the order given."""

    def __init__(self, worker: Worker, spec: TraceSpec | None, device: str) -> None:
        self._worker = worker
        self._trace = None if spec is None else StepTrace(spec, device)

    @classmethod
    def build(cls, spec: WorkerSpec) -> Launcher:
        """Build the worker that the spec describes, or one rank of it, which first connects to the other ranks. Raises the
        errors of `Worker.build`."""
        mesh = spec.place and Mesh.join(spec.place, torch.device(spec.device))
        # Only the first rank writes a trace.
        traces = mesh is None or mesh.rank == 0
        return cls(Worker.build(spec, mesh), spec.trace if traces else None, spec.device)

    @property
    def sizes(self) -> ReplicaSizes:
        """The sizes of the worker, with the number of KV pages settled."""
        return self._worker.sizes

    def launch(self, step: StepBatch) -> Launched:
        """Queue one step on the device. `launch_seconds` of the result is the CPU time of the calling thread, without the
        profiler's work between steps."""
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
        """Write the trace if the run ended before it was complete."""
        if self._trace is not None:
            self._trace.finish()


class StepTrace:
    """Records steps `start` to `start + steps - 1`, counted from 1, and writes the trace file atomically.

    On a GPU only the device's work is recorded: recording the host's operators as well would slow launching down so much that
    the device would be idle between steps.
    """

    def __init__(self, spec: TraceSpec, device: str) -> None:
        self._spec = spec
        activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        self._warm_up = min(WARM_UP_STEPS, spec.start - 1)
        with warnings.catch_warnings():
            # torch warns about a trace from step 1 on, which has no warm-up.
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
        """Stop recording and write what has been recorded."""
        if self._running and not self._finished:
            self._tracer.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._finished = True
        target = self._spec.path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}")
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, target)
