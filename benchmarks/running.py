"""What more running samples bring, and the tail they leave: python -m benchmarks.running

An experiment like `benchmarks.gpu.real` is simulated with the real scheduler: 1,319 questions behind eight examples (1,040
tokens common to all), 64 samples of each, log-normal lengths of mean 51, at most 320, a Llama of 135M on one H200, whose steps
take what `tokabatch.forecast` assumes of a GPU that was not measured. Printed are time and tail (fewer than half of the largest
number running, nothing waiting) at several numbers of running samples, with the questions in plan order, and with those first
that have the longest samples, as if that were known: a part of the spread of lengths is common to a question's samples
(`--between`, the standard deviation of its logarithm). Last comes the number that `engine.max_running: auto` comes to. Figures
are deterministic.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from benchmarks.foresight import LLAMA_1B, PAGE, Grouped
from tokabatch.forecast.assumed_lengths import lognormal
from tokabatch.forecast.profile import unmeasured_gpu
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.forecast.token_budget import assumed_survival, running_samples
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

QUESTIONS, SAMPLES, HEADER, MEAN, SPREAD, MAX_TOKENS = 1319, 64, 1040, 51, 0.8, 320
SMALL = replace(
    LLAMA_1B, vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536
)


def requests_of(questions: int) -> Requests:
    """The prompts, in any order; their tokens take no memory."""
    length = HEADER + np.clip(np.random.default_rng(0).lognormal(np.log(55), 0.4, questions), 10, 220).astype(np.int32)
    lcp = np.full(questions, HEADER, np.int32)
    lcp[:1] = 0
    return Requests(
        row_index=np.arange(questions, dtype=np.int64),
        tokens=np.broadcast_to(np.int32(2), int(length.sum())),
        start=(np.cumsum(length) - length).astype(np.int64),
        length=length,
        lcp=lcp,
        params=np.zeros(questions, np.int32),
        sampling=(SamplingParams(n=SAMPLES, max_tokens=MAX_TOKENS),),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[4096, 6144, 8192, 16_384, 32_768])
    parser.add_argument("--between", type=float, default=0.5, help="of the spread of 0.8 in all")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    args = parser.parse_args()
    requests, cost = requests_of(args.questions), unmeasured_gpu(Roofline(SMALL, H200)).seconds
    within = (SPREAD**2 - args.between**2) ** 0.5
    lengths = Grouped(lognormal(MEAN, args.between, seed=1), lognormal(1000, within, seed=2))
    typical = lengths.between(requests.row_index, np.zeros(len(requests), np.int32))
    orders = {"plan order": np.arange(len(requests)), "longest first": np.argsort(-typical, kind="stable")}
    for running in args.running:
        for name, order in orders.items():
            length = requests.length[order]
            ordered = replace(requests, row_index=requests.row_index[order], start=requests.start[order], length=length)
            longest = -(-(int(length.max()) + MAX_TOKENS) // PAGE)
            limits = SchedulerLimits(PAGE, 300_000, running, running + 8192, longest, GroupingLimits(4, 2))
            done = simulate(ordered, limits, cost, lengths)
            print(
                f"{running:6,} {name:14} {len(done.steps):5,} steps {done.seconds:6.2f} s "
                f"{done.output_tokens_per_second:8,.0f} tok/s  tail {done.tail_seconds:5.2f} s, "
                f"{done.tail_seconds / done.seconds:.1%}",
                flush=True,
            )
    count = args.questions * SAMPLES
    chosen = running_samples(cost, count, assumed_survival([MAX_TOKENS], [False], np.array([float(count)])))
    print(f"auto: {chosen:,}")


if __name__ == "__main__":
    main()
