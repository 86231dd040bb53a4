"""What it brings to begin with the rows that may run longest: python -m benchmarks.longest_first

The real scheduler against the roofline of Llama-3.2-1B on one H200: rows of 200 prompt tokens (100 common to all) that take 200
output tokens each, but for a share that takes 2,048, at random places. Their lengths are known (`ignore_eos` and a row's own
`max_tokens`). Printed are time and tail in the order of the prefix tree alone, and with the longest first within it.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.foresight import LLAMA_1B, PAGE
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.input.prompt_order import longest_first, order_prompts
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

PROMPT, HEADER, SHORT, LONG = 200, 100, 200, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--long", type=float, default=0.01, help="share of the rows that take 2,048 tokens")
    parser.add_argument("--cache-tokens", type=int, default=3_000_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, LLAMA_1B.vocab_size, (args.rows, PROMPT), dtype=np.int32)
    tokens[:, :HEADER] = tokens[0, :HEADER]
    start, length = np.arange(args.rows, dtype=np.int64) * PROMPT, np.full(args.rows, PROMPT, np.int32)
    long = rng.random(args.rows) < args.long
    walk = order_prompts(tokens.ravel(), start, length)
    moved = longest_first(walk, tokens.ravel(), start, length, np.where(long, LONG, SHORT).astype(np.int32), PAGE)
    limits = SchedulerLimits(
        page_size=PAGE,
        num_pages=args.cache_tokens // PAGE,
        max_running=8192,
        max_step_tokens=16_384,
        max_pages_per_sequence=-(-(PROMPT + LONG) // PAGE),
        grouping=GroupingLimits(4, 2),
    )
    for name, order in (("prefix tree", walk), ("longest first", moved)):
        requests = Requests(
            row_index=order.permutation,
            tokens=tokens.ravel(),
            start=start[order.permutation],
            length=length,
            lcp=order.lcp,
            params=long[order.permutation].astype(np.int32),
            sampling=tuple(SamplingParams(max_tokens=limit, ignore_eos=True) for limit in (SHORT, LONG)),
        )
        done = simulate(requests, limits, Roofline(LLAMA_1B, H200).seconds, lambda row, sample: np.full(len(row), 2**31 - 1))
        print(
            f"{name:14} {done.seconds:7.1f} s  tail {done.tail_seconds:6.1f} s ({done.tail_seconds / done.seconds:.0%})"
            f"  {done.output_tokens_per_second:9,.0f} tok/s  prefilled {done.counts.prefilled_tokens:,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
