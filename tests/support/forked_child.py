"""What runs in a forked process: one job through `tokabatch.run`, its engine scripted, something wrong with it on purpose."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.scripted_engine import QUICKSTART, Script, ScriptedWorker, build_worker, quickstart_script
from support import faulty_files, mutants, privileges
from tokabatch import Job, run
from tokabatch.engine.executor import Executor, GroupExecutor, InProcessExecutor, ProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import TokabatchError
from tokabatch.forecast import cost_model as pricing
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.job import ModelConfig
from tokabatch.output import folder
from tokabatch.parallel.mesh import Place
from tokabatch.report.progress import NullProgress
from tokabatch.runner import make_replica, preparation, recorder
from tokabatch.runner.shared import Shared
from tokabatch.workload.prepare import Workload

STEP_SECONDS = 0.002
BATCH_SAMPLES = 4


def _make_within(script: Script, job: Job, workload: Workload, sizes: ReplicaSizes, *_: object) -> Callable[[], Executor]:
    return partial(InProcessExecutor, (script, sizes), build_worker)


def make_apart(
    script: Script, job: Job, workload: Workload, sizes: ReplicaSizes, *_: object, ranks: int = 1
) -> Callable[[], Executor]:
    """The worker in a process of its own, or in one for each rank: forked, as nothing here has threads or a GPU and importing
    takes seconds."""
    fork = multiprocessing.get_context("fork")
    workers = ForkedWorkers(fork)
    multiprocessing.get_context = lambda method=None: fork if method in (None, "fork") else workers
    if ranks > 1:
        return partial(GroupExecutor, RankSpec(script, sizes), ranks, 1, build_rank)
    return partial(ProcessExecutor, (script, sizes), build_worker)


class ForkedWorkers:
    """The context of processes that are forked and, like spawned ones, hold no end of a pipe that is their parent's: the pipe
    of a worker is closed to stop it."""

    def __init__(self, fork: Any) -> None:
        self._fork = fork
        self._ours: list[Any] = []

    def Pipe(self, duplex: bool = True) -> tuple[Any, Any]:
        ours, theirs = self._fork.Pipe(duplex)
        self._ours.append(ours)
        return ours, theirs

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], **how: Any) -> Any:
        return self._fork.Process(target=self._run, args=(target, *args), **how)

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        for end in self._ours:
            end.close()
        target(*args)


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a scripted rank is made of."""

    script: Script
    sizes: ReplicaSizes
    place: Place | None = None


def build_rank(spec: RankSpec) -> ScriptedWorker:
    return ScriptedWorker(spec.script, spec.sizes)


class PowerCut(BaseException):
    """Nothing that the process does from here on reaches the disk."""


class Child:
    def __init__(self) -> None:
        # Whatever the first run would import or measure is there when the fork comes: PyArrow, for one, imports pandas then.
        load_tokenizer(ModelConfig(path=str(QUICKSTART)))
        pa.array([0])
        measured = pricing.present_device("cpu")
        pricing.measure_processor = lambda memory: replace(measured, memory=memory)
        # What is here now is not looked at again in each child, nor copied for that.
        gc.collect()
        gc.freeze()

    def run(self, request: dict[str, Any], told: int) -> int:
        """The exit code, as `tokabatch run` would have it; `told` is a descriptor for what there is to tell."""
        script = quickstart_script(slots=64, step_seconds=request.get("step_seconds", STEP_SECONDS))
        apart = partial(make_apart, script, ranks=request.get("ranks", 1))
        make_replica.executor_maker = apart if request.get("apart") else partial(_make_within, script)
        preparation.BATCH_SAMPLES = recorder.BATCH_SAMPLES = BATCH_SAMPLES
        if request.get("mutant"):
            mutants.MUTANTS[request["mutant"]]()
        files = _files(request.get("fault"))
        folder.DurableFiles = lambda: files
        if request.get("powerless"):
            privileges.give_up_override()
        leaks = _note_leaks()
        message, code, display = "", 1, _Messages()
        try:
            job = Job.load(request["job"])
            flags = dict(request.get("flags", {}))
            if "shared" in flags:
                flags["shared"] = Shared(**flags["shared"])
            code = run(job, display, **flags).exit_code
            message = "; ".join(display.texts)
        except TokabatchError as error:
            message, code = str(error), error.exit_code
        except PowerCut:
            assert isinstance(files, faulty_files.Disk)
            files.cut(Path(request["job"]["output"]["path"]), request["fault"]["lose"])
            code = 99
        gc.collect()
        if leaks and code != 99:
            message, code = f"left open: {leaks}", 1
        os.write(told, json.dumps({"calls": files.calls, "message": message}).encode())
        return code


def _files(fault: dict[str, Any] | None) -> faulty_files.CountedFiles:
    if fault is None:
        return faulty_files.CountedFiles()
    at, kind = fault["at"], fault["kind"]
    if kind == "kill":
        return faulty_files.Killing(at, fault["moment"])
    if kind == "suspend":
        return faulty_files.Suspending(at)
    if kind == "power":
        return _Unplugged(at)
    error = OSError(getattr(errno, fault["error"]), os.strerror(getattr(errno, fault["error"])))
    if kind == "short":
        return faulty_files.Short(at, error)
    return faulty_files.Failing(at, error, last=kind == "lasting")


class _Messages(NullProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def _note_leaks() -> list[str]:
    """What is found to be left open from here on."""
    leaks: list[str] = []
    warnings.simplefilter("error", ResourceWarning)
    sys.unraisablehook = lambda found: leaks.append(str(found.exc_value))
    return leaks


class _Unplugged(faulty_files.Disk):
    """The power fails at call number `at`, and stays away."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if len(self.calls) > self.at:
            raise PowerCut
        super().before(name, arguments)
