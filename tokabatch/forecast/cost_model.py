"""What the steps of a job cost on its device, and how large a replica is, given that.

The cost model is the job's measured profile (`engine.profile`) where it has one, else the roofline of the device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tokabatch.engine.replica_sizes import ReplicaSizes, available_memory, decide_sizes
from tokabatch.errors import JobError, UsageError
from tokabatch.forecast.devices import KNOWN, PROCESSOR, Device, find_device
from tokabatch.forecast.processor import measure_processor
from tokabatch.forecast.profile import SAMPLE_SECONDS, STEP_SECONDS, Profile, SavedProfile, load_profile, unmeasured_gpu
from tokabatch.forecast.ranks import seconds_of_ranks
from tokabatch.forecast.roofline import DeviceRates, Roofline
from tokabatch.forecast.step_log import Steps
from tokabatch.forecast.token_budget import assumed_survival, prefill_tokens, running_samples
from tokabatch.job import Job
from tokabatch.workload.open_model import OpenModel, pick_device
from tokabatch.workload.prepare import Demand

CostModel = Roofline | Profile


def read_profile(job: Job) -> SavedProfile | None:
    """Return the job's profile, for a run on this machine; None if the job names none. Raises JobError for a file that is not a
    profile, or one measured on another device."""
    if job.engine.profile is None:
        return None
    return profile_of(Path(job.engine.profile), device_name(pick_device(job)), "engine.profile")


def profile_of(path: Path, device: str, key: str) -> SavedProfile:
    """Return the profile in a file that `key` names. Raises JobError for a file that is not a profile, or one that was not
    measured on this `device`."""
    try:
        profile = load_profile(path)
    except UsageError as error:
        raise JobError(f"{key}: {error}, or leave {key} out") from error
    if profile.device.name != device:
        where = f"{path} was measured on {profile.device.name}, not on {device}"
        raise JobError(f"{key}: {where}; make one from a run there, or leave {key} out")
    return profile


def device_name(device: str) -> str:
    """Return the name of this machine's `cpu` or `cuda` in profiles and summaries."""
    if device != "cuda":
        return PROCESSOR
    found = find_device(torch.cuda.get_device_name())
    return torch.cuda.get_device_name() if found is None else found.rates.name


def has_known_rates(device: str) -> bool:
    """Return whether a roofline can be made for this machine's `cpu` or `cuda`."""
    return device != "cuda" or find_device(torch.cuda.get_device_name()) is not None


def present_device(device: str) -> Device:
    """Return this machine's `cpu` or `cuda`. Raises UsageError for a GPU whose rates are not known."""
    if device != "cuda":
        return measure_processor(available_memory())
    found = find_device(torch.cuda.get_device_name())
    if found is None:
        raise UsageError(f"the rates of {torch.cuda.get_device_name()} are not known; name one of {', '.join(KNOWN)}")
    return found


def cost_model(workload: OpenModel, device: Device | None, profile: SavedProfile | None) -> tuple[CostModel, str]:
    """Return the measured profile if there is one, else the roofline of `device` (this machine's by default), for a GPU with
    the overhead of steps; and the model in words. Raises UsageError for a device whose rates are not known."""
    if profile is not None:
        return profile.of_model(workload.spec), f"the profile of {profile.source}"
    roofline, described = _roofline(workload, device)
    if roofline.device.name == PROCESSOR:
        return roofline, described
    beside = f"plus {STEP_SECONDS * 1e3:g} ms per step and {SAMPLE_SECONDS * 1e6:g} us per sample"
    return unmeasured_gpu(roofline), f"{described}, {beside}"


def _roofline(workload: OpenModel, device: Device | None) -> tuple[Roofline, str]:
    """Return the roofline of `device` (this machine's by default), and the same in words. Raises UsageError as `cost_model`
    does."""
    device = device or present_device(workload.device)
    roofline = Roofline(workload.spec, device.rates, workload.dtype.itemsize)
    return roofline, "the roofline" if device.measured else "the roofline (published rates, scaled)"


def price_steps(workload: OpenModel, steps: Steps, profile: SavedProfile | None) -> tuple[float, str] | None:
    """Return the seconds of steps that were taken, by the measured profile if there is one, else the least that the roofline of
    this machine's device allows; and the model in words. None if the steps took less than that least: a processor can be
    measured while it is busy, and its caches can hold a small model. Raises UsageError for a device whose rates are not known.
    """
    cost, described = _roofline(workload, None) if profile is None else cost_model(workload, None, profile)
    seconds = float(np.sum(cost.seconds(steps.work)))
    refuted = profile is None and seconds > steps.seconds
    return None if refuted else (seconds, f"{described} of {device_of(cost).name}")


def device_of(cost: CostModel) -> DeviceRates:
    """Return the device of a cost model."""
    return cost.roofline.device if isinstance(cost, Profile) else cost.device


def size_replica(job: Job, workload: Demand, profile: SavedProfile | None, absent: Device | None = None) -> ReplicaSizes:
    """Return the sizes on this machine's device, or on an `absent` GPU. Raises JobError.

    The cost model decides how large steps are, if there is one: a processor is not measured for that, and the rates of some
    GPUs are not known."""
    device, cost = absent, None
    if device is None and workload.device == "cuda":
        device = find_device(torch.cuda.get_device_name())
    if device is not None or profile is not None:
        cost, _ = cost_model(workload, device, profile)
    # What a step takes beside its work does not change how its prompt tokens share the reading of the weights.
    prompts = cost.roofline if isinstance(cost, Profile) and profile is None else cost
    return decide_sizes(
        job.engine,
        workload.spec,
        workload.dtype,
        workload.facts(),
        workload.device,
        prefill_tokens=None if prompts is None else prefill_tokens(prompts.seconds),
        running_samples=None if cost is None or workload.device != "cuda" else _worth_running(cost, workload),
        absent_memory=None if absent is None else int(absent.memory),
        replicas=workload.layout.replicas,
        fp8=job.model.quantization == "fp8",
    )


def _worth_running(cost: CostModel, workload: Demand) -> int:
    """Return how many samples a replica runs at once on a GPU, by its part of what is left to draw."""
    sampling = workload.requests.sampling
    given = [params.has_given_length for params in sampling]
    weights = np.bincount(workload.requests.params, weights=workload.num_samples, minlength=len(sampling)).astype(np.float64)
    survival = assumed_survival([params.max_tokens for params in sampling], given, weights)
    layout, count = workload.layout, int(workload.num_samples.sum())
    seconds = seconds_of_ranks(cost, layout.tensor, layout.pipeline)
    return running_samples(seconds, -(-count // layout.replicas), survival)
