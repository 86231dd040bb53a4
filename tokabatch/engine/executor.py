"""The boundary between the scheduler's process and the model: steps go in, results come out, in the same order.

`InProcessExecutor` launches a step when it is submitted, so that a breakpoint in the model works; `ProcessExecutor` has the
worker in a process of its own and launches while the scheduler decides the next step. Both keep the same contract.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, Literal, Protocol

import torch

from tokabatch.engine import child
from tokabatch.engine.heartbeat import Patience, Pulse, Watch
from tokabatch.engine.launcher import Launcher
from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.errors import StepDropped, TokabatchError, WorkerLost
from tokabatch.scheduling.contracts import StepBatch, StepResult

WORKER_NAME = "tokabatch-worker"
STOP_SECONDS = 5.0
POLL_SECONDS = 0.0002
ALIVE_SECONDS = 0.5
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
        """Get ready what steps to come will want. Called while the device has a step behind the one that runs."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Resume:
    """Follows the steps that a worker shall ignore because it dropped one before them."""


class Executor(Protocol):
    """Any number of steps may be submitted before the first result is collected. Both methods raise WorkerLost when the
    worker is gone, and StepDropped when it had no memory for a step: what was submitted and not collected is lost then."""

    def start(self) -> None:
        """Return when the model is loaded and steps may be submitted. Raises what building the worker raises, or WorkerLost."""
        ...

    @property
    def sizes(self) -> ReplicaSizes:
        """As the worker settled them when it started."""
        ...

    def submit(self, step: StepBatch) -> None: ...

    def collect(self) -> StepResult:
        """The result of the oldest step not yet collected."""
        ...

    def resume(self) -> None:
        """Take new steps after StepDropped."""
        ...

    def close(self) -> None:
        """Release the device, started or not; results not collected are lost."""
        ...


class InProcessExecutor:
    """See `Executor`. A worker in this process, made by `build(spec)`, cannot be lost."""

    def __init__(self, spec: Any, build: Callable[[Any], Launches] = Launcher.build) -> None:
        self._spec, self._build = spec, build
        self._launcher: Launches | None = None
        self._launched: deque[Running] = deque()

    @property
    def sizes(self) -> ReplicaSizes:
        return self._started().sizes

    def start(self) -> None:
        self._launcher = self._build(self._spec)

    def submit(self, step: StepBatch) -> None:
        try:
            self._launched.append(self._started().launch(step))
            self._started().make_ahead()
        except (RuntimeError, MemoryError) as error:
            raise _dropped(step, error) from error

    def collect(self) -> StepResult:
        return self._launched.popleft().wait()

    def resume(self) -> None:
        self._launched.clear()

    def close(self) -> None:
        self._launched.clear()
        if self._launcher is not None:
            self._launcher.close()

    def _started(self) -> Launches:
        assert self._launcher is not None, "not started"
        return self._launcher


class ProcessExecutor:
    """See `Executor`. `build(spec)` makes the worker in a process of its own, which the constructor spawns, as a forked child
    cannot use CUDA."""

    def __init__(
        self,
        spec: Any,
        build: Callable[[Any], Launches] = Launcher.build,
        patience: Patience | None = None,
        start_method: Literal["spawn", "forkserver"] = "spawn",
    ) -> None:
        context = multiprocessing.get_context("spawn" if start_method == "spawn" else "forkserver")
        self._pipe, their_pipe = context.Pipe()
        self._signs, pulse = context.Pipe(duplex=False)
        ends = (their_pipe, pulse, pickle.dumps((_serve, (build, spec))))
        self._process: BaseProcess = context.Process(target=child.main, args=ends, name=WORKER_NAME, daemon=True)  # pyright: ignore
        # Here and not in `start`, which may be broken off: a process half started would have no owner.
        _start_shielded(self._process)
        their_pipe.close()
        pulse.close()
        self._watch = Watch(self._signs, patience or Patience(), self._process.kill)
        self._sizes: ReplicaSizes | None = None

    @property
    def sizes(self) -> ReplicaSizes:
        assert self._sizes is not None, "not started"
        return self._sizes

    def start(self) -> None:
        sizes = self._receive()
        assert isinstance(sizes, ReplicaSizes)
        self._sizes = sizes
        self._watch.ready()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def submit(self, step: StepBatch) -> None:
        self._send(step)

    def collect(self) -> StepResult:
        result = self._receive()
        assert isinstance(result, StepResult)
        return result

    def resume(self) -> None:
        self._send(Resume())

    def close(self) -> None:
        self._pipe.close()
        self._watch.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        # Not before: without a reader of its signs the worker ends at once, and may have a trace to write.
        self._signs.close()

    def _send(self, message: StepBatch | Resume) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            # Results of earlier steps, and last of all what went wrong, may still lie in the pipe.
            while True:
                self._receive(error)

    def _receive(self, cause: Exception | None = None) -> StepResult | ReplicaSizes:
        try:
            # A dead worker's end closes at once, unless a process that it left behind holds it open.
            while not self._pipe.poll(ALIVE_SECONDS):
                if not self._process.is_alive() and not self._pipe.poll():
                    raise self._gone()
            message = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from (cause or error)
        if isinstance(message, TokabatchError):
            raise message
        return message

    def _gone(self) -> WorkerLost:
        self._process.join(STOP_SECONDS)
        if self._watch.fault is not None:
            return WorkerLost(f"the worker process hung ({self._watch.fault}) and was killed", "hung")
        code = self._process.exitcode
        if code is not None and code < 0:
            name = next((each.name for each in signal.Signals if each == -code), "unknown")
            return WorkerLost(f"the worker process was killed by signal {-code} ({name})", "killed")
        return WorkerLost(f"the worker process died (exit code {code}); its own output says why", "died")


def _start_shielded(process: BaseProcess) -> None:
    """Start it with the signals held back that the parent deals with, until it ignores them, and without importing the
    program's main module: a worker needs nothing of it. It would take seconds, and a script that calls `run` where it stands
    would call it again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, child.PARENTS_SIGNALS)
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, work: tuple[Callable[[Any], Launches], Any], pulse: Pulse) -> None:
    """The worker process: its sizes when it is ready, then a result for each step, until the other end closes. After any error
    but the want of memory it ends: the device's context may be gone, and is never used again.

    Steps are drained by a thread: were both sides to block in a send larger than the pipe's buffer, neither would go on.
    """
    build, spec = work
    steps: queue.SimpleQueue[StepBatch | Resume | None] = queue.SimpleQueue()
    try:
        launcher = build(spec)
        pipe.send(launcher.sizes)
        threading.Thread(target=_drain, args=(pipe, steps), daemon=True).start()
        _work(launcher, steps, pipe, pulse)
        launcher.close()
    except TokabatchError as error:
        pipe.send(error)
    except ConnectionError:
        return
    except Exception as error:
        reason = " ".join(traceback.format_exception_only(error)[-1].split())
        pipe.send(WorkerLost(f"the worker process failed: {reason}\n{traceback.format_exc()}"))


def _work(launcher: Launches, steps: queue.SimpleQueue[StepBatch | Resume | None], pipe: Connection, pulse: Pulse) -> None:
    """Launch what arrives, ahead of sending back what is done: the device always has the next step queued. Between two launches
    a moment goes to what later steps will want."""
    launched: deque[Running] = deque()
    ahead = False
    while True:
        try:
            step = steps.get(timeout=POLL_SECONDS if launched else None)
        except queue.Empty:
            if launched[0].done:
                _send_back(launched.popleft(), pipe, pulse)
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
            dropped = _dropped(step, error)
            while launched:
                _send_back(launched.popleft(), pipe, pulse)
            pipe.send(dropped)
            pulse.finished = pulse.begun
            # The steps that build on the dropped one are ignored.
            while not isinstance(skipped := steps.get(), Resume):
                if skipped is None:
                    return


def _send_back(running: Running, pipe: Connection, pulse: Pulse) -> None:
    result = running.wait()
    pulse.finished += 1
    pulse.waiting = True
    pipe.send(result)
    pulse.waiting = False


def _dropped(step: StepBatch, error: RuntimeError | MemoryError) -> StepDropped:
    """What to tell of a step that the device had no memory for. Raises any other error again."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_OUT_OF_MEMORY not in str(error):
        raise error
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    reason = (str(error).splitlines() or ["MemoryError"])[0]
    return StepDropped(f"no memory for a step of {step.num_tokens:,} tokens: {reason}")


def _drain(pipe: Connection, steps: queue.SimpleQueue[StepBatch | Resume | None]) -> None:
    try:
        while True:
            steps.put(pipe.recv())
    except (EOFError, OSError):
        steps.put(None)
