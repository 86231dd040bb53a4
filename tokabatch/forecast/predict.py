"""How long a job takes, before it runs: its prepared input through the simulator, priced by a cost model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tokabatch.errors import OutputError, UsageError
from tokabatch.forecast.cost_model import cost_model, device_name, device_of, present_device, profile_of
from tokabatch.forecast.devices import KNOWN, PROCESSOR, Device, find_device, known_device
from tokabatch.forecast.profile import Profile, SavedProfile, fit_profile, load_profile, profile_document
from tokabatch.forecast.ranks import seconds_of_ranks
from tokabatch.forecast.scenario import Scenario, read_lengths
from tokabatch.forecast.simulate import FleetRules, Simulation, simulate
from tokabatch.forecast.step_log import Steps
from tokabatch.forecast.step_work import StepWork
from tokabatch.forecast.token_budget import assumed_survival, expected_seconds
from tokabatch.job import Job
from tokabatch.model.families import read_spec
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import read_manifest, read_summary, without_manifest
from tokabatch.output.steps import REPLICA, read_steps
from tokabatch.report.outlook import Outlook, Trial
from tokabatch.scheduling.contracts import Requests
from tokabatch.scheduling.scheduler import SchedulerLimits
from tokabatch.storage.atomic_files import DurableFiles, write_whole
from tokabatch.storage.listing import consistently
from tokabatch.workload.open_model import pick_device
from tokabatch.workload.prepare import Workload

PARTS = 48
TRIAL_SAMPLES, TRIAL_WAVES = 20_000, 8
"""Samples that each trial runs at most, and how many times as many as run at once."""


def scenario_profile(job: Job, scenario: Scenario, device: Device | None) -> SavedProfile | None:
    """Return the profile to size and price by. Raises JobError for one of another device."""
    path, key = (scenario.profile, "--profile") if scenario.profile is not None else (job.engine.profile, "engine.profile")
    name = device_name(pick_device(job)) if device is None else device.rates.name
    return None if path is None else profile_of(Path(path), name, key)


def predict_run(
    workload: Workload,
    limits: SchedulerLimits,
    scenario: Scenario,
    device: Device | None,
    profile: SavedProfile | None,
    fleet: FleetRules,
    on_share: Callable[[float], None],
) -> Outlook:
    """Simulate the whole job in its layout, each replica under `limits` on the scenario's `device`, then a part of it on one
    replica under others. `fleet` says how several replicas share the work; `on_share` is called with the share of all this that
    is done. Raises UsageError if nothing is left to run, or nothing is known of this machine's device."""
    if not len(workload.requests):
        raise UsageError("there is nothing to simulate: every row is an error row; `plan` without --simulate says why")
    cost, cost_described = cost_model(workload, device, profile)
    lengths, described = read_lengths(scenario.lengths)
    begin = time.perf_counter()
    layout = workload.layout
    seconds = seconds_of_ranks(cost, layout.tensor, layout.pipeline)
    part, trial_samples = _part(workload, limits)
    tried = _settings(limits)
    meter = _Meter(int(workload.num_samples.sum()) + sum(trial_samples * _steps_each(each, limits) for each in tried), on_share)
    whole = simulate(workload.requests, limits, seconds, lengths, fleet=fleet, on_finished=meter.of(1.0))
    runs = [simulate(part, each, seconds, lengths, on_finished=meter.of(_steps_each(each, limits))) for each in tried]
    counts = whole.counts
    return Outlook(
        device=device_of(cost).name,
        cost_model=cost_described,
        lengths=described,
        samples=counts.finished,
        output_tokens=counts.output_tokens,
        prefilled_tokens=counts.prefilled_tokens,
        saved_tokens=counts.cached_tokens,
        cacheable_tokens=workload.sharing().saved_tokens,
        steps=counts.steps,
        seconds=whole.seconds,
        tail_seconds=whole.tail_seconds,
        kv_tokens=limits.num_pages * limits.page_size,
        layout=str(layout),
        num_devices=layout.replicas * layout.tensor * layout.pipeline,
        idle=tuple(1 - busy / max(whole.seconds, 1e-12) for busy in whole.busy),
        kv_mean=whole.steps.mean("pages") / limits.num_pages,
        kv_use=whole.kv_use,
        kv_over_time=over_time(whole.steps, "pages", limits.num_pages),
        preemptions=counts.preemptions,
        waste=whole.waste,
        waited=whole.waited,
        simulated_in=time.perf_counter() - begin,
        price=scenario.price,
        trials=_trials(tried, runs),
        trial_samples=trial_samples,
    )


def least_seconds(
    workload: Workload, max_running: int, device: Device | None, profile: SavedProfile | None
) -> tuple[float, str]:
    """Return the least time of a job whose samples all have max_tokens tokens and whose replicas run so many at once, without
    the attention to prompts and without the scheduler, which `predict_run` simulates; and the device and the cost model in
    words. Raises UsageError if nothing is known of this machine's device."""
    cost, described = cost_model(workload, device, profile)
    layout, sampling = workload.layout, workload.requests.sampling
    seconds = seconds_of_ranks(cost, layout.tensor, layout.pipeline)
    kinds = np.bincount(workload.requests.params, weights=workload.num_samples, minlength=len(sampling))
    longest = assumed_survival([each.max_tokens for each in sampling], [True] * len(sampling), kinds.astype(np.float64))
    samples, prompts = int(workload.num_samples.sum()), workload.sharing().unique_tokens
    drawing = expected_seconds(seconds, -(-samples // layout.replicas), max_running, longest)
    reading = float(seconds(StepWork(tokens=prompts / layout.replicas, sampled=0.0, sequences=0.0)))
    return drawing + reading, f"{device_of(cost).name}, by {described}"


def profile_run(out: Path, target: Path, device: str | None = None) -> Profile:
    """Fit a profile to the steps recorded in an output folder and write it to `target`, which may be an earlier profile but no
    other file; `device` is a key in `KNOWN`, for a run that has not noted its device. Raises UsageError if there are too few
    steps."""
    folder = OutputFolder(out)
    manifest, columns = read_manifest(folder), consistently(lambda: read_steps(folder), out)
    if manifest is None:
        raise without_manifest(folder)
    if columns is None:
        raise OutputError(f"{out}: no record of steps; a run writes steps-00000.parquet when it ends")
    if target.exists():
        try:
            load_profile(target)
        except UsageError as error:
            raise UsageError(f"--to {target} exists and is not a profile; name another file") from error
    # Consecutive steps are to be those of one replica.
    order = np.argsort(columns[REPLICA], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    summary = read_summary(folder)
    summary = summary.get("this_start", summary)
    spec, itemsize = read_spec(Path(manifest.model_path)), int(summary.get("itemsize", 2))
    noted = str(summary.get("device", ""))
    rates = _ran_on(noted, device).rates
    profile = fit_profile(spec, replace(rates, name=noted or rates.name), Steps(columns), itemsize, source=str(out))
    try:
        temporary = target.with_name(f".{target.name}.partial")
        write_whole(DurableFiles(), temporary, target, profile_document(profile).encode())
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; give another file with --to") from error
    return profile


def _ran_on(noted: str, key: str | None) -> Device:
    """Return the device of a run by the name that it noted, or by its key if the name is not known. Raises UsageError if they
    differ."""
    found = find_device(noted)
    if key is None:
        if found is None and noted not in ("", PROCESSOR):
            raise UsageError(f"the rates of {noted} are not known; name the nearest of {', '.join(KNOWN)} with --device")
        return found or present_device("cpu")
    device = known_device(key)
    if noted == PROCESSOR or (found is not None and found != device):
        raise UsageError(f"--device {key}: the run was on {noted}; leave the option out")
    return device


def over_time(steps: Steps, column: str, whole: float) -> tuple[float, ...]:
    """Return the time-weighted mean of a column over equal parts of a run, as shares of `whole`."""
    seconds = steps["seconds"]
    part = np.minimum((np.cumsum(seconds) - seconds / 2) / max(seconds.sum(), 1e-12) * PARTS, PARTS - 1).astype(np.int64)
    weight = np.bincount(part, weights=seconds, minlength=PARTS)
    value = np.bincount(part, weights=seconds * steps[column], minlength=PARTS)
    return tuple((value / np.maximum(weight, 1e-12) / whole).tolist())


class _Meter:
    """Counts simulated samples, each by the steps it takes, and tells which share of the `total` they are."""

    def __init__(self, total: float, tell: Callable[[float], None]) -> None:
        self._total, self._tell, self._done = total, tell, 0.0
        tell(0.0)

    def of(self, weight: float) -> Callable[[int], None]:
        """Return what counts finished samples of this weight."""

        def count(finished: int) -> None:
            self._done += finished * weight
            self._tell(min(self._done / self._total, 1.0))

        return count


def _part(workload: Workload, limits: SchedulerLimits) -> tuple[Requests, int]:
    """Return the first prompts of the plan, with about as many samples as a trial runs, and the number of their samples."""
    requests, total = workload.requests, np.cumsum(workload.num_samples)
    wanted = min(TRIAL_SAMPLES, TRIAL_WAVES * limits.max_running)
    count = min(len(requests), int(np.searchsorted(total, wanted)) + 1)
    return requests.take(np.arange(count)), int(total[count - 1])


def _settings(limits: SchedulerLimits) -> list[SchedulerLimits]:
    """Return a few running limits and token budgets to try."""
    budget = max(limits.max_step_tokens - limits.max_running, 1)
    pairs = {(limits.max_running, budget)}
    pairs |= {(max(1, limits.max_running // 2), budget), (max(1, limits.max_running // 4), budget)}
    pairs |= {(limits.max_running, max(1, budget // 4)), (limits.max_running, budget * 4)}
    # A job that gives engine.max_running does not run in waves of equal size.
    return [
        replace(
            limits,
            max_running=running,
            max_step_tokens=running + extra,
            alike=limits.alike if running == limits.max_running else None,
        )
        for running, extra in sorted(pairs)
    ]


def _steps_each(tried: SchedulerLimits, limits: SchedulerLimits) -> float:
    """Return how many times as many steps a sample takes under the limits that are tried as under `limits`."""
    return limits.max_running / tried.max_running


def _trials(tried: Sequence[SchedulerLimits], runs: Sequence[Simulation]) -> tuple[Trial, ...]:
    # Of settings that differ by less than half a percent, the smallest is best: it needs less memory.
    least = min(run.seconds for run in runs)
    best = next(i for i, run in enumerate(runs) if run.seconds <= 1.005 * least)
    return tuple(
        Trial(limits.max_running, limits.max_step_tokens, run.seconds, run.counts.output_tokens, i == best)
        for i, (limits, run) in enumerate(zip(tried, runs, strict=True))
    )
