"""tokabatch's own planning, scheduler and worker, as the runner joins them, without files and tokenizer.

The workload gives every sample its own output length, which a row's sampling parameters cannot, so each sample
is a row with n = 1; the samples of a prompt are then found again as rows with equal prompts. Ordering the
prompts is inside the clock. Nothing is tuned: sizes are those that `auto` decides, unless pinned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.engines import Axis, Int32, Result
from benchmarks.workloads import Workload
from tokabatch.engine.executor import Executor, InProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes, WorkloadFacts, decide_sizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.input.prompt_order import order_prompts
from tokabatch.job import EngineConfig
from tokabatch.model.config import read_config
from tokabatch.model.families import read_spec
from tokabatch.runner.replica import scheduler_limits
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.scheduler import Scheduler
from tokabatch.scheduling.stop_conditions import StopRules

WARM_UP_PROMPTS, WARM_UP_TOKENS = 4, 3
AUTO = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """0 is `auto`."""

    page_size: int = 16
    max_running: int = AUTO
    max_step_tokens: int = AUTO
    hydragen: Literal["auto", "off"] = "auto"


SWEEP: tuple[Axis, ...] = ()


@dataclass(frozen=True, slots=True)
class Served:
    """`computed` counts the token positions that went through the model."""

    outputs: dict[int, Int32]
    computed: int


def generate(folder: Path, workload: Workload, settings: Settings) -> Result:
    began = time.perf_counter()
    spec = read_spec(folder)
    dtype = getattr(torch, str(read_config(folder).values["dtype"]))
    sizes = decide_sizes(engine_config(settings), spec, dtype, facts(workload))
    executor = InProcessExecutor(WorkerSpec(folder, spec, dtype, "cpu", "torch_paged", sizes))
    executor.start()
    try:
        warm_up = workload.take(WARM_UP_PROMPTS)
        few = np.minimum(warm_up.output_length_PN, WARM_UP_TOKENS)
        serve(executor, replace(warm_up, output_length_PN=few), sizes, spec.vocab_size)
        started, cpu_started = time.perf_counter(), time.process_time()
        served = serve(executor, workload, sizes, spec.vocab_size)
        finished, cpu_finished = time.perf_counter(), time.process_time()
    finally:
        executor.close()
    return Result(
        outputs=tuple(served.outputs[sample] for sample in range(workload.num_samples)),
        seconds=finished - started,
        cpu_seconds=cpu_finished - cpu_started,
        load_seconds=started - began,
        # The last token drawn of a sample is never computed; the first one comes out of its prefill.
        computed_prefill_tokens=served.computed - (workload.num_output_tokens - workload.num_samples),
        computed_decode_tokens=workload.num_output_tokens,
    )


def engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        page_size=settings.page_size,
        max_running=settings.max_running or "auto",
        max_step_tokens=settings.max_step_tokens or "auto",
        hydragen=False if settings.hydragen == "off" else "auto",
    )


def facts(workload: Workload) -> WorkloadFacts:
    return WorkloadFacts(
        num_samples=workload.num_samples,
        longest_sequence=workload.longest,
        shortest_sequence=workload.longest,
        longest_output=int(workload.output_length_PN.max()),
        num_prompts=workload.num_samples,
        unique_prompt_tokens=workload.num_prompt_tokens,
    )


def serve(executor: Executor, workload: Workload, sizes: ReplicaSizes, vocab_size: int) -> Served:
    requests = plan(workload)
    scheduler = Scheduler(requests, scheduler_limits(sizes), StopRules(requests.sampling, [], vocab_size, None))
    outputs: dict[int, Int32] = {}
    computed = 0
    while not scheduler.done:
        step = scheduler.schedule()
        if step is None:
            raise RuntimeError("the scheduler has work left but no step to run")
        computed += step.num_tokens
        executor.submit(step)
        outputs |= {done.row_index: done.token_ids for done in scheduler.apply(executor.collect())}
    return Served(outputs, computed)


def plan(workload: Workload) -> Requests:
    """One row a sample, numbered as the sample, in plan order."""
    prompts = [prompt for prompt in workload.prompts for _ in range(workload.n)]
    tokens = np.concatenate(prompts)
    length = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    start = np.cumsum(length, dtype=np.int64) - length
    lengths, params = np.unique(workload.output_length_PN.reshape(-1), return_inverse=True)
    order = order_prompts(tokens, start, length)
    first = order.permutation
    return Requests(
        row_index=first,
        tokens=tokens,
        start=start[first],
        length=length[first],
        lcp=order.lcp,
        params=params.astype(np.int32)[first],
        sampling=tuple(
            SamplingParams(temperature=workload.temperature, max_tokens=int(most), ignore_eos=True, seed=workload.seed)
            for most in lengths
        ),
    )
