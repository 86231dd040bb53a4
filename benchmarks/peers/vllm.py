"""vLLM's offline `LLM`. The samples of a prompt that have one length are one request with n."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.peers import Served, warm_up
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Settings:
    """`cascade` attends to a prefix common to all running requests once; it served repeated sampling best, with 8,192
    running, and 4,096 running the chat-like workload."""

    max_num_seqs: int = 8192
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    cascade: bool = True


def serve(folder: Path, workload: Workload, settings: Settings) -> Served:
    began = time.perf_counter()
    engine = LLM(
        model=str(folder),
        dtype="bfloat16",
        seed=workload.seed,
        max_model_len=workload.longest + 1,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enable_prefix_caching=True,
        disable_cascade_attn=not settings.cascade,
    )
    engine.generate(*requests(warm_up(workload)), use_tqdm=False)
    prompts, params = requests(workload)
    started = time.perf_counter()
    answers = engine.generate(prompts, params, use_tqdm=False)
    finished = time.perf_counter()
    lengths = [len(output.token_ids) for answer in answers for output in answer.outputs]
    return Served(started - began, finished - started, len(lengths), sum(lengths))


def requests(workload: Workload) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Prompts as token ids, and how each is sampled."""
    prompts: list[dict[str, Any]] = []
    params: list[SamplingParams] = []
    for group in workload.groups():
        prompts.append({"prompt_token_ids": workload.prompts[group.prompt].tolist()})
        params.append(
            SamplingParams(n=group.samples, temperature=workload.temperature, max_tokens=group.output_length, ignore_eos=True)
        )
    return prompts, params
