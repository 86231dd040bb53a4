"""transformers continuous batching (`generate_batch`), through the manager that it wraps.

The manager is used directly because `generate_batch` takes one output length for all requests, its requests one
each. The n samples of a prompt are requests of their own, for the same reason; block sharing still finds their
common prefix. Requests go in sorted by their tokens, as `generate_batch` sorts them when blocks are shared.

On the CPU its attention is one dense matrix of all query tokens against all cached tokens of the step, with a
mask between requests, so the number of requests in a step is what matters most.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.engines import Axis, Int32, Result
from benchmarks.workloads import Workload

RESULT_TIMEOUT_S = 60.0
PAGE_SIZE_KEY = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"
"""The latter in transformers 5.17."""
SPARE_CACHE = 1.3
"""Cache beyond what the running requests need at their longest: the scheduler keeps 15 % of it free."""


@dataclass(frozen=True, slots=True)
class Settings:
    max_requests: int = 8
    page_size: int = 32
    max_batch_tokens: int = 256
    block_sharing: bool = True
    grouped_heads: bool = True
    scheduler: Literal["fifo", "prefill_first"] = "fifo"
    compile_level: int = 0
    device: str = "cpu"


SWEEP = (
    Axis("max_requests", (8, 16, 32, 64)),
    Axis("max_requests", (8, 4, 2)),
    Axis("grouped_heads", (False,), ordered=False),
    Axis("max_batch_tokens", (256, 512, 1024)),
    Axis("max_batch_tokens", (256, 128)),
    Axis("page_size", (16, 128), ordered=False),
    Axis("block_sharing", (False,), ordered=False),
    Axis("scheduler", ("prefill_first",), ordered=False),
)


def generate(folder: Path, workload: Workload, settings: Settings) -> Result:
    os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1" if settings.grouped_heads else "0"
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval().to(settings.device)
    manager = model.init_continuous_batching(
        generation_config=generation_config(workload), continuous_batching_config=batching_config(workload, settings)
    )
    manager.warmup()
    manager.start()
    try:
        collect(manager, submit(manager, workload, range(min(4, workload.num_samples)), limit=3))
        started, cpu_started = time.perf_counter(), time.process_time()
        outputs = collect(manager, submit(manager, workload, range(workload.num_samples)))
        finished, cpu_finished = time.perf_counter(), time.process_time()
    finally:
        manager.stop(block=True, timeout=RESULT_TIMEOUT_S)
        manager.destroy()
    return Result(
        outputs=tuple(outputs[sample] for sample in range(workload.num_samples)),
        seconds=finished - started,
        cpu_seconds=cpu_finished - cpu_started,
        load_seconds=started - began,
        computed_decode_tokens=workload.num_output_tokens,
    )


def generation_config(workload: Workload) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        eos_token_id=-1, pad_token_id=0, use_cache=False, **(sampling if workload.temperature else {"do_sample": False})
    )


def batching_config(workload: Workload, settings: Settings) -> ContinuousBatchingConfig:
    pages_a_request = -(-workload.longest // settings.page_size) + 1
    size: dict[str, Any] = {PAGE_SIZE_KEY: settings.page_size}
    return ContinuousBatchingConfig(
        **size,
        num_blocks=int(SPARE_CACHE * pages_a_request * settings.max_requests) + 8,
        max_batch_tokens=max(settings.max_batch_tokens, settings.max_requests),
        max_requests_per_batch=settings.max_requests,
        allow_block_sharing=settings.block_sharing,
        scheduler_type=settings.scheduler,
        default_compile_level=settings.compile_level,
        seed=workload.seed,
    )


def submit(manager: Any, workload: Workload, samples: range, limit: int | None = None) -> dict[str, int]:
    """Returns the sample number behind every request id."""
    requests: dict[str, int] = {}
    length_S = workload.output_length_PN.reshape(-1)
    prompts = [prompt.tolist() for prompt in workload.prompts]
    for sample in sorted(samples, key=lambda sample: prompts[sample // workload.n], reverse=True):
        request_id = f"sample-{sample}" if limit is None else f"warm-up-{sample}"
        requests[request_id] = sample
        manager.add_request(
            prompts[sample // workload.n],
            request_id=request_id,
            max_new_tokens=min(int(length_S[sample]), limit or int(length_S[sample])),
            eos_token_id=-1,
        )
    return requests


def collect(manager: Any, requests: dict[str, int]) -> dict[int, Int32]:
    outputs: dict[int, Int32] = {}
    while len(outputs) < len(requests):
        result = manager.get_result(timeout=RESULT_TIMEOUT_S)
        if result is None or result.error is not None:
            raise RuntimeError(f"continuous batching stopped: {result.error if result else 'no result'}")
        if result.is_finished():
            outputs[requests[result.request_id]] = np.array(result.generated_tokens, dtype=np.int32)
    return outputs
