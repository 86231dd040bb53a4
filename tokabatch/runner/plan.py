"""A job before it runs: everything that can be checked without weights, counts, and a simulated run."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from tokabatch.engine.replica_sizes import (
    ABSENT_WORKING_BYTES,
    ReplicaSizes,
    logits_bytes,
    page_bytes,
    ranks_of,
    weight_bytes,
)
from tokabatch.errors import UsageError
from tokabatch.forecast.cost_model import read_profile, size_replica
from tokabatch.forecast.devices import Device
from tokabatch.forecast.predict import least_seconds, predict_run, scenario_profile
from tokabatch.forecast.profile import SavedProfile
from tokabatch.forecast.scenario import Scenario, check_scenario
from tokabatch.forecast.simulate import FleetRules
from tokabatch.job import Job
from tokabatch.model.spec import tensor_shapes
from tokabatch.number_text import counted
from tokabatch.output.probe import check_output
from tokabatch.output.shard_writer import SHARD_BYTES
from tokabatch.report.closing import PER_CODE
from tokabatch.report.outlook import Outlook
from tokabatch.report.plan_report import HostFacts, ModelFacts, PlanReport, ReplicaFacts
from tokabatch.runner.ledger import Ledger, to_give, wants_more
from tokabatch.runner.replica import scheduler_limits
from tokabatch.runner.resume import Start, preview
from tokabatch.workload.prepare import Workload

_TOKEN_ID_BYTES, _SAMPLE_BYTES, _ROW_BYTES = 4, 100, 32
"""Estimated bytes: of a token id of a sample; of a sample's columns besides text, token ids and log-probabilities; and of a
row's numbers in a tokenised input, besides its tokens and columns."""


def plan(job: Job, on_rows: Callable[[int, int], None] | None = None) -> PlanReport:
    """As `tokabatch.plan`. Raises UsageError."""
    profile = read_profile(job)
    with _planned(job, profile, on_rows) as (previewed, sizes):
        return _plan_report(job, previewed, sizes, None, profile)


def plan_and_simulate(
    job: Job,
    scenario: Scenario,
    on_rows: Callable[[int, int], None] | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> tuple[PlanReport, Outlook]:
    """As `plan`, for the device of a scenario, and simulate under it what is left of the run, or the whole job if nothing is
    left. `on_share` is called with the share of the simulation that is done. Raises UsageError, also for a scenario that cannot
    be simulated."""
    device = check_scenario(scenario)
    profile = scenario_profile(job, scenario, device)
    with _planned(job, profile, on_rows, device) as (previewed, sizes):
        workload = _to_compute(previewed)
        fleet = FleetRules(workload.layout.replicas, Ledger, wants_more, to_give)
        limits = scheduler_limits(sizes, workload.layout.pipeline)
        outlook = predict_run(workload, limits, scenario, device, profile, fleet, on_share)
        return _plan_report(job, previewed, sizes, device, profile), outlook


@contextmanager
def _planned(
    job: Job, profile: SavedProfile | None, on_rows: Callable[[int, int], None] | None, absent: Device | None = None
) -> Generator[tuple[Start, ReplicaSizes]]:
    """Return the job as a run would start it, and the sizes for what is left of it."""
    check_output(Path(job.output.path))
    with tempfile.TemporaryDirectory(prefix="tokabatch-plan-") as scratch:
        previewed = preview(job, Path(scratch), on_rows, absent_gpu=absent is not None)
        yield previewed, size_replica(job, _to_compute(previewed), profile, absent)
        previewed.workload.store.close()


def _to_compute(previewed: Start) -> Workload:
    """Return what a run would compute, or, for a finished run, what it has computed."""
    return previewed.left if len(previewed.left.requests) else previewed.workload


def _plan_report(
    job: Job, previewed: Start, sizes: ReplicaSizes, absent: Device | None, profile: SavedProfile | None
) -> PlanReport:
    workload = previewed.workload
    spec, store, sharing = workload.spec, workload.store, workload.sharing()
    model = ModelFacts(
        path=str(workload.folder),
        family=spec.family,
        parameters=sum(prod(shape) for shape in tensor_shapes(spec).values()),
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        dtype=str(workload.dtype).removeprefix("torch."),
    )
    requests = workload.requests
    limits = [params.max_tokens for params in requests.sampling]
    first = store.first_prompt_row
    ids = store.prompt(first).tolist() if first is not None else []
    done = previewed.committed.samples
    left = workload.samples_total - done
    notes = [f"{job.output.path} holds {done:,} of these samples; a run computes the other {left:,}"] if done and left else []
    if not left and workload.samples_total:
        notes.append(
            f"{job.output.path} holds all of these samples: sizes and simulation are those of the whole job, as in a new folder"
        )
    if job.verify is not None and (stop := job.verify.stop) is not None:
        least = stop.after_correct or stop.majority or 1
        saved = int(np.maximum(workload.samples_of_row - least, 0).sum())
        after = counted(least, "right sample" if stop.after_correct else "equal answer")
        notes.append(
            f"verify.stop: a row stops after {after}, which saves {saved:,} of {counted(workload.samples_total, 'sample')} at "
            "most; sizes and simulation are those of a run that saves none. A row's samples begin in waves (4, then up to 8, "
            "16 and so on), each of which computes its prompt again"
        )
    whose = "the tokenizer's chat template" if job.prompt.chat_template is None else "the chat template of prompt.chat_template"
    notes += [f"{whose} is applied"] if store.chat else []
    notes += workload.notes
    seen: Counter[str] = Counter()
    for failure in workload.failures:
        seen[failure.error.code] += 1
        if seen[failure.error.code] <= PER_CODE:
            notes.append(f"row {failure.row_index:,}: {failure.error.code}: {failure.error.message}")
    notes += [f"{counted(number - PER_CODE, 'more row')}: {code}" for code, number in seen.items() if number > PER_CODE]
    return PlanReport(
        model=model,
        layout=str(workload.layout),
        replica=_replica_facts(job, workload, sizes, absent is not None),
        rows=store.num_rows,
        samples=workload.samples_total,
        prompt_tokens=sharing.total_tokens,
        unique_tokens=sharing.unique_tokens,
        max_output_tokens=sum(limits[p] * int(n) for p, n in zip(requests.params, workload.num_samples, strict=True)),
        longest_prompt=int(requests.length.max(initial=0)),
        first_prompt=workload.tokenizer.decode_batch([ids], skip_special_tokens=False)[0],
        first_token_ids=tuple(ids),
        settings=workload.settings,
        host=_host_facts(job, workload, ids),
        least_seconds=_least_seconds(_to_compute(previewed), sizes, absent, profile),
        error_counts=workload.error_counts,
        error_samples=job.generation.n * len(workload.failures),
        max_error_fraction=job.errors.max_fraction,
        notes=tuple(notes),
    )


def _replica_facts(job: Job, workload: Workload, sizes: ReplicaSizes, absent: bool) -> ReplicaFacts:
    spec, dtype, on_gpu = workload.spec, workload.dtype, workload.device == "cuda"
    fp8, named = job.model.quantization == "fp8", str(dtype).removeprefix("torch.")
    ranks = ranks_of(job.engine)
    return ReplicaFacts(
        bytes_per_token=page_bytes(job.engine, spec, dtype) // sizes.page_size,
        page_size=sizes.page_size,
        pages=sizes.num_pages,
        max_running=sizes.max_running,
        max_step_tokens=sizes.max_step_tokens,
        weight_bytes=sum(weight_bytes(spec, dtype, not on_gpu, mesh, fp8=fp8) for mesh in ranks),
        weight_type=f"fp8, embeddings in {named}" if fp8 else named,
        logits_bytes=logits_bytes(sizes.max_running, spec, dtype),
        working_bytes=ABSENT_WORKING_BYTES * len(ranks) if absent else None,
        measured_at_start=on_gpu and not absent,
    )


def _host_facts(job: Job, workload: Workload, ids: Sequence[int]) -> HostFacts:
    """Return the estimated bytes of texts, assuming the mean token length of the first prompt, whose token ids are given."""
    store, n = workload.store, workload.samples_of_row
    text = workload.tokenizer.decode_batch([list(ids)], skip_special_tokens=False)[0]
    token = _TOKEN_ID_BYTES + (len(text.encode()) / len(ids) if len(ids) else 0.0)
    requests, facts = workload.requests, workload.facts()
    limits = np.array([params.max_tokens for params in requests.sampling], np.int64)[requests.params]
    drawn = float((limits * workload.num_samples).sum()) * token + facts.reported_bytes
    rows = store.row_bytes(np.arange(store.num_rows))
    carried = float((rows * n).sum()) + workload.samples_total * _SAMPLE_BYTES
    shards = min(1.0, job.output.rows_per_shard / max(1, workload.samples_total))
    return HostFacts(
        input_bytes=store.tokens.nbytes + int(rows.sum()) + store.num_rows * _ROW_BYTES,
        waiting_bytes=int(min((drawn + carried) * shards, SHARD_BYTES)),
        output_bytes=int(drawn + carried),
    )


def _least_seconds(
    workload: Workload, sizes: ReplicaSizes, device: Device | None, profile: SavedProfile | None
) -> tuple[float, str] | None:
    try:
        return least_seconds(workload, sizes.max_running, device, profile) if len(workload.requests) else None
    except UsageError:  # The rates of this machine's GPU are not known; the job can run all the same.
        return None
