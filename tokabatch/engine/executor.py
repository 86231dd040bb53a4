"""The boundary between the scheduler's process and the model: steps go in, results come out, in the same order.

`InProcessExecutor` launches a step when it is submitted, so that a breakpoint in the model works; `ProcessExecutor` has the
worker in a process of its own and launches while the scheduler decides the next step. Both keep the same contract.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import Protocol

from tokabatch.engine.launcher import Launcher, TimedLaunch
from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.errors import EngineError, TokabatchError
from tokabatch.messages import StepBatch, StepResult

STOP_SECONDS = 10.0
POLL_SECONDS = 0.0002


class Executor(Protocol):
    """Any number of steps may be submitted before the first result is collected."""

    @property
    def sizes(self) -> ReplicaSizes:
        """As the worker settled them."""
        ...

    def submit(self, step: StepBatch) -> None: ...

    def collect(self) -> StepResult:
        """The result of the oldest step not yet collected. Raises EngineError when the worker is gone."""
        ...

    def close(self) -> None:
        """Release the device; results not collected are lost."""
        ...


class InProcessExecutor:
    """See `Executor`."""

    def __init__(self, spec: WorkerSpec) -> None:
        worker = Worker.build(spec)
        self._sizes = worker.sizes
        self._launcher = Launcher(worker, spec.profile, spec.device)
        self._launched: deque[TimedLaunch] = deque()

    @property
    def sizes(self) -> ReplicaSizes:
        return self._sizes

    def submit(self, step: StepBatch) -> None:
        self._launched.append(self._launcher.launch(step))

    def collect(self) -> StepResult:
        return self._launched.popleft().wait()

    def close(self) -> None:
        self._launched.clear()
        self._launcher.close()


class ProcessExecutor:
    """See `Executor`. The process is spawned, not forked: a forked child cannot use CUDA."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), name="tokabatch-worker", daemon=True)
        self._process.start()
        theirs.close()
        self._sizes = self._receive()

    @property
    def sizes(self) -> ReplicaSizes:
        assert isinstance(self._sizes, ReplicaSizes)
        return self._sizes

    def submit(self, step: StepBatch) -> None:
        try:
            self._pipe.send(step)
        except OSError as error:
            # Results of earlier steps, and last of all what went wrong, may still lie in the pipe.
            while True:
                self._receive(error)

    def collect(self) -> StepResult:
        result = self._receive()
        assert isinstance(result, StepResult)
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, cause: Exception | None = None) -> StepResult | ReplicaSizes:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from (cause or error)
        if isinstance(message, TokabatchError):
            self.close()
            raise message
        return message

    def _gone(self) -> EngineError:
        self._process.join(STOP_SECONDS)
        return EngineError(f"the worker process died (exit code {self._process.exitcode}); its own output says why")


def _serve(pipe: Connection, spec: WorkerSpec) -> None:
    """The worker process: its sizes when it is ready, then a result for each step, until the other end closes.

    Steps are drained by a thread: were both sides to block in a send larger than the pipe's buffer, neither would go on.
    """
    # Ctrl-C reaches the whole process group; when to stop is the parent's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps: queue.SimpleQueue[StepBatch | None] = queue.SimpleQueue()
    try:
        worker = Worker.build(spec)
        launcher = Launcher(worker, spec.profile, spec.device)
        pipe.send(worker.sizes)
        threading.Thread(target=_drain, args=(pipe, steps), daemon=True).start()
        _work(launcher, steps, pipe)
        launcher.close()
    except TokabatchError as error:
        pipe.send(error)
    except ConnectionError:
        return
    except Exception:
        pipe.send(EngineError(f"the worker process failed:\n{traceback.format_exc()}"))


def _work(launcher: Launcher, steps: queue.SimpleQueue[StepBatch | None], pipe: Connection) -> None:
    """Launch what arrives, ahead of sending back what is done: the device always has the next step queued."""
    launched: deque[TimedLaunch] = deque()
    while True:
        try:
            step = steps.get(timeout=POLL_SECONDS if launched else None)
        except queue.Empty:
            if launched[0].done:
                pipe.send(launched.popleft().wait())
            continue
        if step is None:
            return
        launched.append(launcher.launch(step))


def _drain(pipe: Connection, steps: queue.SimpleQueue[StepBatch | None]) -> None:
    try:
        while True:
            steps.put(pipe.recv())
    except (EOFError, OSError):
        steps.put(None)
