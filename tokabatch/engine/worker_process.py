"""The loop of a worker process: it launches steps as they arrive and returns their results in the same order.

`executor` is the other end of the pipe.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from tokabatch.engine.heartbeat import Pulse
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import StepDropped, TokabatchError, WorkerLost
from tokabatch.number_text import counted
from tokabatch.scheduling.contracts import StepBatch, StepResult

POLL_SECONDS = 0.0002
CPU_OUT_OF_MEMORY = "can't allocate memory"


class Running(Protocol):
    """A step in flight, as `Worker.launch` returns it."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> StepResult:
        """Block until the step has finished, and return its result."""
        ...


class Launches(Protocol):
    """What executes steps: a `Launcher` with its worker, or a stand-in in tests."""

    @property
    def sizes(self) -> ReplicaSizes: ...

    def launch(self, step: StepBatch) -> Running: ...

    def make_ahead(self) -> None:
        """Capture a graph for later steps. Called while the device has another step queued after the current one."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Resume:
    """The message after which a worker launches steps again, having dropped a step and ignored those sent after it."""


def serve(pipe: Connection, work: tuple[Callable[[Any], Launches], Any, bool], pulse: Pulse) -> None:
    """Run the worker process until the other end of the pipe closes.

    `work` is the function that builds the launcher, its argument, and whether results are sent. The sizes are sent when the
    worker is ready, then a result for each step. After any error except lack of memory, the error is sent and the function
    returns: the device's context may be unusable.

    A thread reads the steps from the pipe: if both sides blocked in a send larger than the pipe's buffer, they would deadlock.
    """
    build, spec, answers = work
    # Not a SimpleQueue: in Python 3.11 its `get` may block forever if the timeout expires before it begins to wait.
    steps: queue.Queue[StepBatch | Resume | None] = queue.Queue()
    try:
        launcher = build(spec)
        pipe.send(launcher.sizes)
        threading.Thread(target=_drain, args=(pipe, steps), daemon=True).start()
        _work(launcher, steps, pipe, pulse, answers)
        launcher.close()
    except TokabatchError as error:
        pipe.send(error)
    except ConnectionError:
        return
    except Exception as error:
        reason = " ".join(traceback.format_exception_only(error)[-1].split())
        pipe.send(WorkerLost(f"the worker process failed: {reason}\n{traceback.format_exc()}"))


def _work(
    launcher: Launches, steps: queue.Queue[StepBatch | Resume | None], pipe: Connection, pulse: Pulse, answers: bool
) -> None:
    """Launch arriving steps, and send back finished results as soon as the device has another step queued: the scheduler
    decides the next step from them, and a launch may take as long as a small step. A graph for later steps is captured between
    launches, while at least two steps are queued."""
    results = pipe if answers else None
    launched: deque[Running] = deque()
    ahead = False
    while True:
        while len(launched) > 1 and launched[0].done:
            _send_back(launched.popleft(), results, pulse)
        try:
            step = steps.get(timeout=POLL_SECONDS if launched else None)
        except queue.Empty:
            if launched[0].done:
                _send_back(launched.popleft(), results, pulse)
            elif ahead and len(launched) > 1:
                launcher.make_ahead()
                ahead = False
            continue
        if step is None:
            return
        if isinstance(step, Resume):
            continue
        pulse.begun += 1
        try:
            launched.append(launcher.launch(step))
            ahead = True
        except (RuntimeError, MemoryError) as error:
            told = dropped(step, error)
            while launched:
                _send_back(launched.popleft(), results, pulse)
            pipe.send(told)
            pulse.finished = pulse.begun
            # Ignore the steps that depend on the dropped one.
            while not isinstance(skipped := steps.get(), Resume):
                if skipped is None:
                    return


def _send_back(running: Running, results: Connection | None, pulse: Pulse) -> None:
    result = running.wait()
    pulse.finished += 1
    if results is not None:
        pulse.waiting = True
        results.send(result)
        pulse.waiting = False


def dropped(step: StepBatch, error: RuntimeError | MemoryError) -> StepDropped:
    """Return the message that a step was dropped for lack of memory. Raises the error again if it is of another kind."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_OUT_OF_MEMORY not in str(error):
        raise error
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    reason = (str(error).splitlines() or ["MemoryError"])[0]
    return StepDropped(f"no memory for a step of {counted(step.num_tokens, 'token')}: {reason}")


def _drain(pipe: Connection, steps: queue.Queue[StepBatch | Resume | None]) -> None:
    try:
        while True:
            steps.put(pipe.recv())
    except (EOFError, OSError):
        steps.put(None)
