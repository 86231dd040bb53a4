"""SGLang's offline `Engine`. Every sample is a request of its own: `n` must be one for a whole batch there, and the radix cache
finds the common prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang

from benchmarks.peers import Served, warm_up
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Settings:
    """Attention backend and memory share are the engine's own choices."""

    max_running_requests: int = 8192
    chunked_prefill_size: int = 16384


def serve(folder: Path, workload: Workload, settings: Settings) -> Served:
    began = time.perf_counter()
    engine = sglang.Engine(
        model_path=str(folder),
        dtype="bfloat16",
        random_seed=workload.seed,
        context_length=workload.longest + 8,
        max_running_requests=settings.max_running_requests,
        chunked_prefill_size=settings.chunked_prefill_size,
        log_level="error",
    )
    try:
        engine.generate(**requests(warm_up(workload)))
        engine.flush_cache()
        arguments = requests(workload)
        started = time.perf_counter()
        answers = engine.generate(**arguments)
        finished = time.perf_counter()
    finally:
        engine.shutdown()
    lengths = [len(answer["output_ids"]) for answer in answers]
    return Served(started - began, finished - started, len(lengths), sum(lengths))


def requests(workload: Workload) -> dict[str, Any]:
    """The arguments of `Engine.generate`."""
    token_ids: list[list[int]] = []
    params: list[dict[str, Any]] = []
    for group in workload.groups():
        one = {"temperature": workload.temperature, "max_new_tokens": group.output_length, "ignore_eos": True}
        token_ids += [workload.prompts[group.prompt].tolist()] * group.samples
        params += [one] * group.samples
    return {"input_ids": token_ids, "sampling_params": params}
