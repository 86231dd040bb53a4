"""Creates the replicas of a run: their schedulers, their workers, and the processes in which both run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tokabatch.attention import choose_backend
from tokabatch.engine.executor import Executor, GroupExecutor, InProcessExecutor, ProcessExecutor, Starter
from tokabatch.engine.heartbeat import Patience
from tokabatch.engine.replica_sizes import MOST_STEPS, ReplicaSizes
from tokabatch.engine.warm_up import kinds_of_drawing
from tokabatch.engine.worker import TraceSpec, WorkerSpec
from tokabatch.errors import UsageError
from tokabatch.job import Job
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.report.progress import Progress
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.forked import can_fork
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Ledger
from tokabatch.runner.member import Cluster
from tokabatch.runner.replica import Replica, Standing, scheduler_limits
from tokabatch.runner.resume import Start
from tokabatch.runner.stopping_replica import StoppingReplica
from tokabatch.runner.supply import Supply
from tokabatch.scheduling.contracts import Requests
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules, TokenText
from tokabatch.workload.prepare import Demand


@dataclass(frozen=True, slots=True)
class _Build:
    """See `Build`. `make` creates the executors of the replica with the number `traced`, `other` those of the others. It can be
    pickled for a process on another host."""

    limits: SchedulerLimits
    stops: StopRules
    make: Callable[[], Executor]
    other: Callable[[], Executor]
    traced: int
    depth: int
    depth_of_few: int | None
    max_restarts: int | None
    name_row: Callable[[int], str]

    def __call__(
        self, number: int, requests: Requests, before: Standing, *, stop: Interruption, tell: Callable[[str], None]
    ) -> Replica:
        scheduled = replace(before.scheduled)
        return Replica(
            Scheduler(requests, self.limits, self.stops, counts=scheduled),
            self.make if number == self.traced else self.other,
            depth=self.depth,
            depth_of_few=self.depth_of_few,
            max_restarts=self.max_restarts,
            num_samples=scheduled.finished + int(requests.num_samples().sum()),
            counts=before.counts,
            stop=stop,
            tell=tell,
            name_row=self.name_row,
        )


def make_replica(
    job: Job,
    started: Start,
    sizes: ReplicaSizes,
    claim: Claim,
    stop: Interruption,
    progress: Progress,
    supply: Supply | None,
    cluster: Cluster | None = None,
    starter: Starter | None = None,
) -> Replica | StoppingReplica | Fleet:
    """Return what runs the steps: a replica in this process if the only worker is here as well, otherwise a fleet of processes,
    on the hosts of the `cluster` if there is one. `starter` creates the workers' processes; without it they are spawned. Raises
    UsageError if the work comes from a `supply` and this system cannot fork processes."""
    workload, layout = started.left, started.left.layout
    tokenizer, sampling = workload.tokenizer, workload.requests.sampling
    text = None
    if any(params.stop for params in sampling):
        text = TokenText(tokenizer.piece_texts(), tokenizer.decode_batch, tokenizer.special_ids(), tokenizer.lone_bytes())
    stops = StopRules(sampling, workload.eos_token_ids, workload.spec.vocab_size, text)
    apart, depth, on_gpu = _runs_apart(job, workload), job.engine.queue_depth, workload.device == "cuda"
    stages, limits = layout.pipeline, scheduler_limits(sizes, layout.pipeline)
    traced = job.trace.replica if job.trace else 0
    if traced >= layout.replicas:
        raise UsageError(
            f"trace.replica is {traced}, but the run has {counted(layout.replicas, 'replica')}; write 0 to "
            f"{layout.replicas - 1}"
        )
    make = other = executor_maker(job, workload, sizes, progress.message, starter)
    if job.trace and layout.replicas > 1:
        other = executor_maker(job.model_copy(update={"trace": None}), workload, sizes, lambda text: None, starter)

    build = _Build(
        limits,
        stops,
        make,
        other,
        traced,
        depth=min(MOST_STEPS, max(2 if on_gpu else 1, stages + (stages > 1))) if depth == "auto" else depth,
        depth_of_few=3 if on_gpu and stages == 1 and depth == "auto" else None,
        max_restarts=job.engine.max_restarts if apart else None,
        name_row=workload.store.places.name,
    )
    if supply is not None and not can_fork():
        raise UsageError("--shared needs Linux: it forks processes")
    here = supply is None and cluster is None and (not apart or not can_fork())
    begun = None if started.stops is None else started.stops.begun()
    if here and begun is not None and len(workload.requests):
        first = partial(build, 0, before=Standing.before(limits), stop=stop, tell=progress.message)
        return StoppingReplica(Ledger(workload.requests, begun), first)
    if here:
        return build(0, workload.requests, Standing.before(limits), stop=stop, tell=progress.message)
    # A member without a sample would load the model for nothing.
    devices = layout.devices[: max(1, int(workload.num_samples.sum()))]
    if len(devices) > 1:
        progress.message(f"{layout}")
    return Fleet(
        workload.requests,
        limits,
        devices,
        build,
        stop=stop,
        tell=progress.message,
        max_restarts=job.engine.max_restarts,
        hang_seconds=job.engine.hang_seconds,
        interval=progress.interval,
        leave=claim.leave if supply is None else supply.leave,
        supply=supply,
        begun=begun,
        launch=None if cluster is None else cluster.launcher(layout, workload.device, workload.folder, progress.message),
    )


def _runs_apart(job: Job, workload: Demand) -> bool:
    """Return whether workers have processes of their own: on a GPU, with several replicas or ranks, or if the job says so."""
    layout = workload.layout
    if layout.replicas * layout.tensor * layout.pipeline > 1:
        return True
    return workload.device == "cuda" if job.engine.process == "auto" else job.engine.process


def executor_maker(
    job: Job, workload: Demand, sizes: ReplicaSizes, tell: Callable[[str], None], starter: Starter | None = None
) -> Callable[[], Executor]:
    """Return the function that creates the replica's executor and its replacements. The GPU is queried here, because the
    replica's forked process cannot use CUDA."""
    backend, obstacle = choose_backend(workload.device, workload.dtype, workload.spec.head_dim)
    if obstacle and len(workload.requests):
        tell(f"warning: attention runs in plain torch, many times slower than FlashInfer's kernels: {obstacle}")
    # A worker on another host has another working folder.
    spec = WorkerSpec(
        folder=workload.folder.absolute(),
        files=tuple(replace(file, path=file.path.absolute()) for file in workload.files),
        spec=workload.spec,
        dtype=workload.dtype,
        device=workload.device,
        backend=backend,
        sizes=sizes,
        fp8=job.model.quantization == "fp8",
        kv_dtype=torch.float8_e4m3fn if job.engine.kv_cache_dtype == "fp8" else None,
        draws=kinds_of_drawing(workload.requests.sampling),
        trace=job.trace and TraceSpec(Path(job.trace.path).absolute(), job.trace.start, job.trace.steps),
        replicas=workload.layout.replicas,
        async_tp=job.engine.async_tp is not False,
    )
    patience, layout = Patience.of(job.engine.hang_seconds), workload.layout
    if layout.tensor * layout.pipeline > 1:
        return partial(GroupExecutor, spec, layout.tensor, layout.pipeline, patience=patience, starter=starter)
    if _runs_apart(job, workload):
        return partial(ProcessExecutor, spec, patience=patience, starter=starter)
    return partial(InProcessExecutor, spec)
