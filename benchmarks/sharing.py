"""Prefill saved against the prefix tree's optimum, with a cache far smaller than the tree: python -m benchmarks.sharing

The real scheduler, simulated. `tree`: 100,000 prompts under four levels of shared prefixes (10 x 10 x 20 x 50 branches of 256,
128, 96 and 160 tokens) and a cache that holds a fiftieth of all the tree's tokens. `--gsm8k FOLDER` adds the GSM8K job:
1,319 problems behind 8 shots, 100 samples each, tokenised with the quickstart's tokenizer, a cache of a million tokens.
Optimum: every node of the prefix tree computed once, and every sample of a prompt beyond that nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.foresight import LLAMA_1B
from tokabatch.arrays import Int32
from tokabatch.forecast.assumed_lengths import lognormal
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.input.prompt_order import measure_sharing, order_prompts
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

PAGE, SHARE = 16, 50
BRANCHES, TOKENS = (10, 10, 20, 50), (256, 128, 96, 160)


def tree() -> list[Int32]:
    """The prompts of the synthetic tree, in random order."""
    rng = np.random.default_rng(0)
    prompts: list[Int32] = [np.zeros(0, np.int32)]
    for branches, tokens in zip(BRANCHES, TOKENS, strict=True):
        prompts = [
            np.concatenate((prompt, rng.integers(0, 30_000, tokens, dtype=np.int32)))
            for prompt in prompts
            for _ in range(branches)
        ]
    return [prompts[i] for i in rng.permutation(len(prompts))]


def gsm8k(folder: Path) -> list[Int32]:
    """The prompts of jobs/gsm8k.yaml."""
    tokenizer = Tokenizer.from_file("jobs/quickstart/tokenizer.json")
    shots = [json.loads(line) for line in Path("jobs/data/gsm8k_shots.jsonl").read_text().splitlines()[:8]]
    header = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    texts = [f"{header}Question: {row['question']}\nAnswer:" for row in rows]
    return [np.array(encoded.ids, np.int32) for encoded in tokenizer.encode_batch(texts)]


def measure(name: str, prompts: list[Int32], params: SamplingParams, max_running: int, cache_tokens: int | None = None) -> None:
    """Simulate and print one line; the cache holds a fiftieth of the tree where `cache_tokens` is not given."""
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    start = np.cumsum(length, dtype=np.int64) - length
    flat = np.concatenate(prompts)
    order = order_prompts(flat, start, length)
    chosen = order.permutation
    requests = Requests(
        row_index=chosen,
        tokens=flat,
        start=start[chosen],
        length=length[chosen],
        lcp=order.lcp,
        params=np.zeros(len(chosen), np.int32),
        sampling=(params,),
    )
    sharing = measure_sharing(requests.length, requests.lcp, np.full(len(chosen), params.n, np.int64))
    limits = SchedulerLimits(
        page_size=PAGE,
        num_pages=(cache_tokens or sharing.unique_tokens // SHARE) // PAGE,
        max_running=max_running,
        max_step_tokens=max_running + 8192,
        max_pages_per_sequence=-(-(int(length.max()) + params.max_tokens) // PAGE),
        grouping=GroupingLimits(4, 2),
    )
    begin = time.perf_counter()
    done = simulate(requests, limits, Roofline(LLAMA_1B, H200).seconds, lognormal(params.max_tokens / 3, 0.6))
    counts = done.counts
    again = counts.prefilled_tokens - (counts.prompt_tokens - counts.cached_tokens)
    saved = counts.cached_tokens - again
    print(
        f"| {name} | {len(prompts):,} | {params.n} | {sharing.total_tokens:,} | {sharing.unique_tokens:,} "
        f"| {limits.num_pages * PAGE:,} | {saved / sharing.saved_tokens:.2%} | {again:,} | {counts.preemptions:,} "
        f"| {time.perf_counter() - begin:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="folder that holds GSM8K's test.jsonl")
    args = parser.parse_args()
    print("| workload | prompts | n | prompt tokens | tree | cache | saved of possible | computed again | preemptions | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    if args.gsm8k:
        measure("GSM8K", gsm8k(args.gsm8k), SamplingParams(n=100, max_tokens=512), 8192, 1 << 20)
    measure("tree of four levels", tree(), SamplingParams(max_tokens=96), 4096)


if __name__ == "__main__":
    main()
