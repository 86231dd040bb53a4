"""Simulating a whole run at size: python -m benchmarks.simulation [--samples 1000000] [--running 8192]

One sample for each prompt of 200 tokens (a header of 100 common to all), log-normal output lengths of mean 200, at most 1,024,
against the roofline of Llama-3.2-1B on one H200. Printed are the time and memory that the simulation takes, and what it says.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from benchmarks.foresight import LLAMA_1B
from tokabatch.forecast.assumed_lengths import lognormal
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

PAGE, PROMPT, HEADER, MAX_TOKENS = 16, 200, 100, 1024


def requests_of(count: int) -> Requests:
    """The prompts; their tokens take no memory."""
    lcp = np.full(count, HEADER, np.int32)
    lcp[0] = 0
    return Requests(
        row_index=np.arange(count, dtype=np.int64),
        tokens=np.broadcast_to(np.int32(2), count * PROMPT),
        start=np.arange(count, dtype=np.int64) * PROMPT,
        length=np.full(count, PROMPT, np.int32),
        lcp=lcp,
        params=np.zeros(count, np.int32),
        sampling=(SamplingParams(max_tokens=MAX_TOKENS),),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--running", type=int, default=8192)
    parser.add_argument("--cache-tokens", type=int, default=3_000_000)
    args = parser.parse_args()
    limits = SchedulerLimits(
        page_size=PAGE,
        num_pages=args.cache_tokens // PAGE,
        max_running=args.running,
        max_step_tokens=args.running + 8192,
        max_pages_per_sequence=-(-(PROMPT + MAX_TOKENS) // PAGE),
        grouping=GroupingLimits(4, 2),
    )
    begin, cpu = time.perf_counter(), time.process_time()
    done = simulate(requests_of(args.samples), limits, Roofline(LLAMA_1B, H200).seconds, lognormal(200, 0.7))
    print(
        f"{done.counts.finished:,} samples, {len(done.steps):,} steps, {done.steps['running'].mean():,.0f} running on average"
    )
    print(f"simulated in {time.perf_counter() - begin:,.0f} s ({time.process_time() - cpu:,.0f} s of CPU)")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:,.2f} GB")
    print(f"predicted {done.seconds:,.0f} s, {done.output_tokens_per_second:,.0f} output tokens/s, KV use {done.kv_use:.1%}")


if __name__ == "__main__":
    main()
