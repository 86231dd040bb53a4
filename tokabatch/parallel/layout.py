"""The layout of a run on the devices of a host: a number of replicas, each on its own devices.

The layout does not affect what is sampled, and a run may continue with another one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tokabatch.errors import JobError
from tokabatch.job import EngineConfig
from tokabatch.number_text import counted

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Layout:
    """`replicas` copies of the weights, each over `tensor` x `pipeline` devices. `devices` has an entry for each replica: its
    GPUs as `CUDA_VISIBLE_DEVICES` names them, none on a CPU. `reason` explains the number of replicas."""

    replicas: int
    tensor: int
    pipeline: int
    devices: tuple[tuple[str, ...], ...]
    reason: str

    def __str__(self) -> str:
        split = f" of {self.tensor} x {self.pipeline} devices (tensor x pipeline)" if self.tensor * self.pipeline > 1 else ""
        count = f"{counted(self.replicas, 'replica')}{split}"
        return f"{count} ({self.reason})" if self.reason else count


def visible_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs that this process may use, each as `CUDA_VISIBLE_DEVICES` names it: a number, a UUID or the name of a
    slice."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count]) if len(named) >= count else tuple(map(str, range(count)))


def decide_layout(config: EngineConfig, device: str, visible: Sequence[str] | None) -> Layout:
    """Return the layout given by the job, or fitting the `visible` GPUs; None plans for one GPU that is not in this machine.
    Raises JobError if there are fewer GPUs than the job needs."""
    each, given = config.tensor * config.pipeline, config.replicas
    if each > 1 and config.process is False:
        raise JobError(
            f"engine.tensor is {config.tensor} and engine.pipeline {config.pipeline}, and every rank has a process of its own; "
            "remove engine.process: false"
        )
    names = visible if device == "cuda" and visible is not None else ()
    present = len(names) if names else None
    if given != "auto":
        replicas, reason = given, "engine.replicas"
        if replicas > 1 and sys.platform != "linux":
            raise JobError(f"engine.replicas is {given}; several replicas need Linux, write 1")
        if replicas > 1 and config.process is False:
            raise JobError(f"engine.replicas is {given}, and each has processes of its own; remove engine.process: false")
    elif present is None:
        replicas, reason = 1, "on a GPU that is not here" if device == "cuda" else "one uses all cores of a CPU"
    elif sys.platform != "linux":
        replicas, reason = 1, "several run on Linux alone"
    elif config.process is False:
        replicas, reason = 1, "engine.process is false"
    else:
        replicas, reason = max(1, present // each), counted(present, "visible GPU")
    if present is not None and each > present:
        raise JobError(
            f"engine.tensor is {config.tensor} and engine.pipeline {config.pipeline}, which takes {counted(each, 'GPU')}, but "
            f"{counted(present, 'is', 'are')} visible ({VISIBLE}); lower them"
        )
    if present is not None and replicas * each > present:
        raise JobError(
            f"engine.replicas is {replicas}, but {counted(present, 'GPU is', 'GPUs are')} visible ({VISIBLE}); write at most "
            f"{present // each}, or auto"
        )
    devices = tuple(tuple(names[place * each : (place + 1) * each]) for place in range(replicas))
    return Layout(replicas, config.tensor, config.pipeline, devices, reason)
