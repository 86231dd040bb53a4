"""The worker process's side: steps are launched as they arrive, results go back in their order.

`executor` holds the other end.
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
from tokabatch.scheduling.contracts import StepBatch, StepResult

POLL_SECONDS = 0.0002
CPU_OUT_OF_MEMORY = "can't allocate memory"


class Running(Protocol):
    """A step on its way, as `Worker.launch` returns it."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> StepResult: ...


class Launches(Protocol):
    """What executes steps: a `Launcher` with its worker, or a scripted one in tests."""

    @property
    def sizes(self) -> ReplicaSizes: ...

    def launch(self, step: StepBatch) -> Running: ...

    def make_ahead(self) -> None:
        """Prepare graphs for later steps. Called while the device has a step queued behind the one that runs."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Resume:
    """Follows the steps that a worker shall ignore because it dropped one before them."""


def serve(pipe: Connection, work: tuple[Callable[[Any], Launches], Any, bool], pulse: Pulse) -> None:
    """The worker process, given what builds the worker, of what, and whether it answers: its sizes when it is ready, then a
    result for each step, until the other end closes. After any error but a lack of memory it ends: the device's context may
    be gone, and is never used again.

    Steps are drained by a thread: were both sides to block in a send larger than the pipe's buffer, neither would go on.
    """
    build, spec, answers = work
    # Not a SimpleQueue: in Python 3.11 its `get` may wait for good where the timeout passes before the wait begins.
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
    """Launch what arrives, ahead of sending back what is done: the device always has the next step queued. Between two launches
    a moment is used to prepare for later steps."""
    results = pipe if answers else None
    launched: deque[Running] = deque()
    ahead = False
    while True:
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
            # The steps that build on the dropped one are ignored.
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
    """The message about a step that the device had no memory for. Raises any other error again."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_OUT_OF_MEMORY not in str(error):
        raise error
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    reason = (str(error).splitlines() or ["MemoryError"])[0]
    return StepDropped(f"no memory for a step of {step.num_tokens:,} tokens: {reason}")


def _drain(pipe: Connection, steps: queue.Queue[StepBatch | Resume | None]) -> None:
    try:
        while True:
            steps.put(pipe.recv())
    except (EOFError, OSError):
        steps.put(None)
