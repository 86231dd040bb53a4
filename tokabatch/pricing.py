"""What the steps of a job cost on its device, and how large a replica is, given that.

The cost model is the job's measured profile (`engine.profile`) where it has one, else the roofline of the device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tokabatch.costs.budget import prefill_tokens
from tokabatch.costs.devices import KNOWN, Device, find_device, measure_processor
from tokabatch.costs.profile import Profile, SavedProfile, load_profile
from tokabatch.costs.roofline import Roofline
from tokabatch.costs.trace import Steps
from tokabatch.engine.sizing import ReplicaSizes, available_memory, decide_sizes
from tokabatch.errors import JobError, UsageError
from tokabatch.job import EngineConfig
from tokabatch.preparation import Prepared

CostModel = Roofline | Profile


def read_profile(config: EngineConfig) -> SavedProfile | None:
    """The job's profile; None where it names none. Raises JobError for a file that is none."""
    if config.profile is None:
        return None
    try:
        return load_profile(Path(config.profile))
    except UsageError as error:
        raise JobError(f"engine.profile: {error}, or leave the key out") from error


def choose_device(key: str | None, present: str) -> Device:
    """The device named, or the one of this machine. Raises UsageError for one whose rates are not known."""
    if key is not None:
        if key not in KNOWN:
            raise UsageError(f"there is no device `{key}` to simulate; known are {', '.join(KNOWN)}")
        return KNOWN[key]
    if present != "cuda":
        return measure_processor(available_memory())
    found = find_device(torch.cuda.get_device_name())
    if found is None:
        raise UsageError(f"the rates of {torch.cuda.get_device_name()} are not known; name one of {', '.join(KNOWN)}")
    return found


def cost_model(prepared: Prepared, device: Device, profile: SavedProfile | None) -> CostModel:
    """The measured profile where there is one, else the roofline."""
    if profile is not None:
        return profile.of_model(prepared.spec)
    return Roofline(prepared.spec, device.rates, prepared.dtype.itemsize)


def describe(cost: CostModel, device: Device) -> str:
    if isinstance(cost, Profile):
        return f"the profile of {cost.source} ({cost.roofline.device.name})"
    return "the roofline" + ("" if device.measured else " (published rates, scaled)")


def price_steps(prepared: Prepared, steps: Steps, profile: SavedProfile | None) -> tuple[float, str]:
    """Seconds of steps that were taken, by the cost model of this machine's device, and its description. Raises UsageError
    for a device whose rates are not known."""
    device = choose_device(None, prepared.device)
    cost = cost_model(prepared, device, profile)
    where = f" of {device.rates.name}" if isinstance(cost, Roofline) else ""
    return float(np.sum(cost.seconds(steps.work))), describe(cost, device) + where


def size_replica(config: EngineConfig, prepared: Prepared, profile: SavedProfile | None) -> ReplicaSizes:
    """The sizes on this machine's device. Raises JobError."""
    device = find_device(torch.cuda.get_device_name()) if prepared.device == "cuda" else None
    return decide_sizes(
        config,
        prepared.spec,
        prepared.dtype,
        prepared.workload(),
        prepared.device,
        prefill_tokens=_prefill_tokens(prepared, device, profile),
    )


def size_elsewhere(config: EngineConfig, prepared: Prepared, profile: SavedProfile | None, device: Device) -> ReplicaSizes:
    """What they come to on a GPU that is not here. Raises JobError."""
    return decide_sizes(
        config,
        prepared.spec,
        prepared.dtype,
        prepared.workload(),
        "cuda",
        prefill_tokens=_prefill_tokens(prepared, device, profile),
        absent_memory=int(device.memory),
    )


def _prefill_tokens(prepared: Prepared, device: Device | None, profile: SavedProfile | None) -> int | None:
    """What a step's prompt tokens come to by the cost model. None without one: a processor is not measured for that, and
    some GPUs' rates are not known."""
    if profile is not None:
        return prefill_tokens(profile.of_model(prepared.spec).seconds)
    return None if device is None else prefill_tokens(cost_model(prepared, device, None).seconds)
