"""A worker of token ids for a process of its own, which breaks as a script says. Built there by `build`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support.token_device import TokenDevice
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.parallel.mesh import Place
from tokabatch.scheduling.contracts import StepBatch, StepResult
from tokabatch.scheduling.scheduler import SchedulerLimits


@dataclass(frozen=True)
class Script:
    """What goes wrong. Step numbers count from 1 in each worker; what happens `once` leaves a file of its name in `marks`."""

    limits: SchedulerLimits
    prompts: list[list[int]]
    marks: Path
    load_seconds: float = 0.0
    sleep: Mapping[int, float] = field(default_factory=dict)
    """Seconds that a step takes, the first time it comes to that step."""
    poison: frozenset[int] = frozenset()
    """Rows that kill the worker whenever they are admitted."""
    raises: Mapping[int, str] = field(default_factory=dict)
    """Steps that raise RuntimeError with this text, once."""
    memory_tokens: int | None = None
    """Steps of more tokens find no memory."""
    dies_loading: int = 0
    """Number of workers that die before they are ready."""
    place: Place | None = None
    """Of one rank; scripted ranks compute the same, each for itself."""


@dataclass
class Finished:
    result: StepResult
    done: bool = True

    def wait(self) -> StepResult:
        return self.result


class ScriptedWorker:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.device = TokenDevice(script.limits)
        self.device.prompts = script.prompts
        self.steps = 0
        limits = script.limits
        self.sizes = ReplicaSizes(
            page_size=limits.page_size,
            num_pages=limits.num_pages,
            max_running=limits.max_running,
            max_step_tokens=limits.max_step_tokens,
            max_pages_per_sequence=limits.max_pages_per_sequence,
            min_group=limits.grouping.min_group if limits.grouping else 0,
            min_prefix_pages=1,
        )

    def close(self) -> None:
        """Nothing is held."""

    def make_ahead(self) -> None:
        """Everything is ready."""

    def launch(self, step: StepBatch) -> Finished:
        script = self.script
        self.steps += 1
        if script.poison.intersection(step.inits.row.tolist()):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.steps in script.sleep and self.once(f"sleep{self.steps}"):
            time.sleep(script.sleep[self.steps])
        if self.steps in script.raises and self.once(f"raise{self.steps}"):
            raise RuntimeError(script.raises[self.steps])
        if script.memory_tokens is not None and step.num_tokens > script.memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Finished(self.device.run(step))

    def once(self, name: str) -> bool:
        mark = self.script.marks / name
        first = not mark.exists()
        mark.touch()
        return first


def build(script: Script) -> ScriptedWorker:
    time.sleep(script.load_seconds)
    worker = ScriptedWorker(script)
    for number in range(script.dies_loading):
        if worker.once(f"load{number}"):
            os._exit(3)
    return worker
