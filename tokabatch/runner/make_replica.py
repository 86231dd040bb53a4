"""The replica of a run: its scheduler, what makes its workers, and where both of them live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tokabatch.attention import choose_backend
from tokabatch.engine.executor import Executor, GroupExecutor, InProcessExecutor, ProcessExecutor
from tokabatch.engine.heartbeat import Patience
from tokabatch.engine.sizing import MOST_STEPS, ReplicaSizes
from tokabatch.engine.warm_up import kinds_of_drawing
from tokabatch.engine.worker import TraceSpec, WorkerSpec
from tokabatch.job import Job
from tokabatch.output.existing_results import read_committed
from tokabatch.output.folder import Claim
from tokabatch.report.progress import Progress
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.recorder import Recorder
from tokabatch.runner.replica import Replica, Standing, scheduler_limits
from tokabatch.runner.replica_process import Build, ReplicaProcess, can_fork
from tokabatch.runner.resume import Start
from tokabatch.scheduling.scheduler import Scheduler
from tokabatch.scheduling.stopping import StopRules, TokenText
from tokabatch.workload import Workload, special_ids


def make_replica(
    job: Job,
    started: Start,
    sizes: ReplicaSizes,
    recorder: Recorder,
    claim: Claim,
    stop: Interruption,
    progress: Progress,
) -> Replica | ReplicaProcess:
    """What does the steps: in this process where its worker is, else in one of its own."""
    workload, stops = started.left, _stop_rules(started.left)
    apart, depth, on_gpu = _runs_apart(job, workload), job.engine.queue_depth, workload.device == "cuda"
    stages = workload.layout.pipeline
    limits = scheduler_limits(sizes, stages)
    build = partial(
        Replica,
        make=executor_maker(job, workload, sizes, progress.message),
        depth=min(MOST_STEPS, max(2 if on_gpu else 1, stages + (stages > 1))) if depth == "auto" else depth,
        depth_of_few=3 if on_gpu and stages == 1 and depth == "auto" else None,
        max_restarts=job.engine.max_restarts if apart else None,
        num_samples=int(workload.num_samples.sum()),
    )

    def rebuild(lost: Standing) -> Build:
        """What is finished is read back from the folder, as by the next start of the run; the counts go on."""
        recorder.finish()
        committed = read_committed(claim.folder, workload.samples_of_row, names=claim.committed)
        left = Start.after(committed, started.workload).left
        scheduled = replace(
            lost.scheduled,
            finished=int(workload.num_samples.sum() - left.num_samples.sum()),
            finished_prompts=len(workload.requests) - len(left.requests),
        )
        scheduler = Scheduler(left.requests, limits, stops, counts=scheduled)
        counts = replace(lost.counts, restarts=lost.counts.restarts + Counter({"scheduler": 1}))
        return partial(build, scheduler, counts=counts)

    first = partial(build, Scheduler(workload.requests, limits, stops))
    if apart and can_fork():
        return ReplicaProcess(
            first,
            rebuild,
            stop=stop,
            tell=progress.message,
            max_restarts=job.engine.max_restarts,
            hang_seconds=job.engine.hang_seconds,
            interval=progress.interval,
            leave=claim.leave,
        )
    return first(stop=stop, tell=progress.message)


def _runs_apart(job: Job, workload: Workload) -> bool:
    """Whether the worker has a process of its own: on a GPU, when it has several ranks, or when the job asks for it."""
    if workload.layout.tensor * workload.layout.pipeline > 1:
        return True
    return workload.device == "cuda" if job.engine.process == "auto" else job.engine.process


def executor_maker(job: Job, workload: Workload, sizes: ReplicaSizes, tell: Callable[[str], None]) -> Callable[[], Executor]:
    """What makes the replica's executor, and another where that one is lost. The GPU is asked here, not in the replica's
    process, which is forked and cannot."""
    backend, obstacle = choose_backend(workload.device, workload.dtype, workload.spec.head_dim)
    if obstacle and len(workload.requests):
        tell(f"attention runs in plain torch, many times slower than FlashInfer's kernels: {obstacle}")
    spec = WorkerSpec(
        folder=workload.folder,
        files=workload.files,
        spec=workload.spec,
        dtype=workload.dtype,
        device=workload.device,
        backend=backend,
        sizes=sizes,
        fp8=job.model.quantization == "fp8",
        kv_dtype=torch.float8_e4m3fn if job.engine.kv_cache_dtype == "fp8" else None,
        draws=kinds_of_drawing(workload.requests.sampling),
        trace=job.trace and TraceSpec(Path(job.trace.path), job.trace.start, job.trace.steps),
    )
    patience, layout = Patience.of(job.engine.hang_seconds), workload.layout
    if layout.tensor * layout.pipeline > 1:
        return partial(GroupExecutor, spec, layout.tensor, layout.pipeline, patience=patience)
    if _runs_apart(job, workload):
        return partial(ProcessExecutor, spec, patience=patience)
    return partial(InProcessExecutor, spec)


def _stop_rules(workload: Workload) -> StopRules:
    tokenizer, sampling = workload.tokenizer, workload.requests.sampling
    text = None
    if any(params.stop for params in sampling):
        text = TokenText(tokenizer.piece_texts(), tokenizer.decode_batch, special_ids(tokenizer), tokenizer.lone_bytes())
    return StopRules(sampling, workload.eos_token_ids, workload.spec.vocab_size, text)
