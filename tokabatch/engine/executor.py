"""The boundary between the scheduler's process and the model: steps go in, results come out, in the same order.

`InProcessExecutor` launches a step when it is submitted, so that a breakpoint in the model works; `ProcessExecutor` has the
worker in a process of its own and launches while the scheduler decides the next step. `GroupExecutor` has a worker of several
ranks, each in a process of its own. All keep the same contract.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Protocol

from tokabatch.engine import child
from tokabatch.engine.heartbeat import Patience, Watch
from tokabatch.engine.launcher import Launcher
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.engine.worker_process import Launches, Resume, Running, dropped, serve
from tokabatch.errors import TokabatchError, WorkerLost
from tokabatch.parallel.mesh import Place
from tokabatch.scheduling.contracts import StepBatch, StepResult

WORKER_NAME = "toka-worker"
STOP_SECONDS = 5.0
ALIVE_SECONDS = 0.5
DYING_SECONDS = 0.5


class Executor(Protocol):
    """Any number of steps may be submitted before the first result is collected. Both methods raise WorkerLost when the
    worker is gone, and StepDropped when it had no memory for a step: what was submitted and not collected is lost then."""

    def start(self) -> None:
        """Return when the model is loaded and steps may be submitted. Raises what building the worker raises, or WorkerLost."""
        ...

    @property
    def sizes(self) -> ReplicaSizes:
        """The sizes that the worker settled when it started."""
        ...

    def submit(self, step: StepBatch) -> None: ...

    def collect(self) -> StepResult:
        """Return the result of the oldest step not yet collected, waiting for it if necessary."""
        ...

    def resume(self) -> None:
        """Accept new steps after StepDropped."""
        ...

    def close(self) -> None:
        """Release the device, started or not; results not collected are lost."""
        ...


class WorkerProcess(Protocol):
    """What an executor uses of a process, as multiprocessing defines it."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...

    @property
    def sentinel(self) -> int: ...

    def start(self) -> None: ...

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


Starter = Callable[..., WorkerProcess]
"""Creates a process, given `target`, `args`, `name` and `daemon` as multiprocessing's `Process`."""


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
            raise dropped(step, error) from error

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
    """See `Executor`. `build(spec)` makes the worker in a process of its own, which the constructor starts with `starter`; by
    default it is spawned, as a forked child of a process that has used CUDA cannot use it."""

    def __init__(
        self,
        spec: Any,
        build: Callable[[Any], Launches] = Launcher.build,
        patience: Patience | None = None,
        starter: Starter | None = None,
    ) -> None:
        self._start_ranks([spec], 0, build, patience or Patience(), starter)

    def _start_ranks(
        self,
        specs: Sequence[Any],
        answering: int,
        build: Callable[[Any], Launches],
        patience: Patience,
        starter: Starter | None,
    ) -> None:
        """Start a process for each spec. All of them get every step; the one at `answering` sends the results."""
        self._ranks: list[_Rank] = []
        self._sizes: ReplicaSizes | None = None
        try:
            for number, spec in enumerate(specs):
                name = "the worker process" if len(specs) == 1 else f"the process of the worker's rank {number}"
                self._ranks.append(_Rank(starter, name, (build, spec, number == answering), patience))
        except BaseException:
            self.close()
            raise

    @property
    def sizes(self) -> ReplicaSizes:
        assert self._sizes is not None, "not started"
        return self._sizes

    def start(self) -> None:
        for _ in self._ranks:
            rank, sizes = self._receive()
            assert isinstance(sizes, ReplicaSizes)
            self._sizes = sizes
            rank.watch.ready()

    @property
    def pid(self) -> int | None:
        """The process id of the first rank."""
        return self._ranks[0].process.pid

    def submit(self, step: StepBatch) -> None:
        self._send(step)

    def collect(self) -> StepResult:
        _, result = self._receive()
        assert isinstance(result, StepResult)
        return result

    def resume(self) -> None:
        self._send(Resume())

    def close(self) -> None:
        for rank in self._ranks:
            rank.pipe.close()
        end = time.monotonic() + STOP_SECONDS
        for rank in self._ranks:
            rank.close(end)

    def _send(self, message: StepBatch | Resume) -> None:
        pickled = ForkingPickler.dumps(message)
        try:
            for rank in self._ranks:
                rank.pipe.send_bytes(pickled)
        except OSError as error:
            # Results of earlier steps, and behind them the error, may still be in the pipes.
            while True:
                self._receive(error)

    def _receive(self, cause: Exception | None = None) -> tuple[_Rank, StepResult | ReplicaSizes]:
        """Return the next message of any rank. Raise the error that a rank reports, or WorkerLost if one has ended."""
        # A dead worker's end closes at once, unless a process that it left behind holds it open.
        while not (ready := wait([rank.pipe for rank in self._ranks], ALIVE_SECONDS)):
            for rank in self._ranks:
                if not rank.process.is_alive() and not rank.pipe.poll():
                    raise self._lost(rank.gone())
        rank = next(rank for rank in self._ranks if rank.pipe is ready[0])
        try:
            message = rank.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._lost(rank.gone()) from (cause or error)
        if isinstance(message, TokabatchError):
            raise self._lost(message)
        return rank, message

    def _lost(self, found: TokabatchError) -> TokabatchError:
        """End the other ranks and return the error to raise after one rank has reported `found`. The neighbours of a rank that
        was killed report a lost connection, so its own error is preferred."""
        if len(self._ranks) > 1:
            # A process that is killed closes its connections before it has ended.
            end = time.monotonic() + DYING_SECONDS
            while (left := end - time.monotonic()) > 0 and all((rank.process.exitcode or 0) >= 0 for rank in self._ranks):
                wait([rank.process.sentinel for rank in self._ranks if rank.process.is_alive()], left)
            killed = (rank.gone() for rank in self._ranks if rank.is_gone)
            found = next((fault for fault in killed if fault.cause in ("hung", "killed")), found)
            for rank in self._ranks:
                rank.process.kill()
        return found


class GroupExecutor(ProcessExecutor):
    """See `Executor`. A worker of `tensor` times `pipeline` ranks. The failure of one rank, lack of memory included, ends
    all of them."""

    def __init__(
        self,
        spec: WorkerSpec,
        tensor: int,
        pipeline: int,
        build: Callable[[Any], Launches] = Launcher.build,
        patience: Patience | None = None,
        starter: Starter | None = None,
    ) -> None:
        # The ranks meet by a file: a port might be another run's.
        self._folder = TemporaryDirectory(prefix="tokabatch-ranks-")
        meeting = Path(self._folder.name) / "meeting"
        specs = [replace(spec, place=Place(rank, tensor, pipeline, meeting)) for rank in range(tensor * pipeline)]
        self._start_ranks(specs, tensor * (pipeline - 1), build, patience or Patience(), starter)

    def resume(self) -> None:
        raise WorkerLost("a rank of the worker ran out of memory in a step, so all ranks were stopped", "out of memory")

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


class _Rank:
    """One process of a worker, its pipe for steps and results, and the watch over it."""

    def __init__(
        self,
        starter: Starter | None,
        name: str,
        work: tuple[Callable[[Any], Launches], Any, bool],
        patience: Patience,
    ) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, their_pipe = context.Pipe()
        self._signs, pulse = context.Pipe(duplex=False)
        ends = (their_pipe, pulse, pickle.dumps((serve, work)))
        self.process: WorkerProcess = (starter or context.Process)(target=child.main, args=ends, name=WORKER_NAME, daemon=True)
        # Not in `start`, which may be interrupted: a process half started would have no owner.
        _start_shielded(self.process)
        their_pipe.close()
        pulse.close()
        self.watch = Watch(self._signs, patience, self.process.kill)

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended or is about to end; messages that it has sent are dropped."""
        try:
            while self.pipe.poll():
                self.pipe.recv()
        except (EOFError, OSError):
            return True
        return not self.process.is_alive()

    def gone(self) -> WorkerLost:
        """Return how the process ended, as an error to raise."""
        self.process.join(STOP_SECONDS)
        if self.watch.fault is not None:
            return WorkerLost(f"{self._name} hung ({self.watch.fault}) and was killed", "hung")
        code = self.process.exitcode
        if code is not None and code < 0:
            name = next((each.name for each in signal.Signals if each == -code), "unknown")
            return WorkerLost(f"{self._name} was killed by signal {-code} ({name})", "killed")
        return WorkerLost(f"{self._name} died (exit code {code}); see its output above for the reason", "died")

    def close(self, end: float) -> None:
        """End the process, by force at that time of the monotonic clock; its pipe has been closed."""
        self.watch.close()
        self.process.join(max(0.0, end - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        # Not before: without a reader of its signs the worker ends at once, and may have a trace to write.
        self._signs.close()


def _start_shielded(process: WorkerProcess) -> None:
    """Start a process with the signals that the parent handles blocked, until it ignores them, and without importing the
    program's main module, of which a worker needs nothing: the import would take seconds, and a script that calls `run` at its
    top level would call it again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, child.PARENTS_SIGNALS)
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
