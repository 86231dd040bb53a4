"""What the token budget of a step is worth: python -m benchmarks.token_budget [--launch-ms 0 3]

The real scheduler is simulated on one H200 with Llama-3.2-1B at several budgets for prompt tokens, by the roofline and by the
same with so many milliseconds added to every step, for launches and what else does not depend on its size. Printed are
seconds; the last column is the budget that `tokabatch.forecast.token_budget` chooses for that cost model. Figures are
deterministic.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.foresight import LLAMA_1B, PAGE
from tokabatch.arrays import Int32
from tokabatch.forecast.assumed_lengths import Lengths, Unstopped, lognormal
from tokabatch.forecast.profile import Profile
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.forecast.token_budget import prefill_tokens
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

BUDGETS = (512, 2048, 8192, 16_384, 32_768, 65_536)


@dataclass(frozen=True)
class Case:
    """`length` are the prompts' tokens, the first `header` of them common to all."""

    name: str
    length: Int32
    header: int
    n: int
    max_tokens: int
    output: Lengths
    max_running: int = 8192
    cache_tokens: int = 3_000_000

    def requests(self) -> Requests:
        """The prompts; their tokens take no memory."""
        count = len(self.length)
        lcp = np.full(count, self.header, np.int32)
        lcp[:1] = 0
        return Requests(
            row_index=np.arange(count, dtype=np.int64),
            tokens=np.broadcast_to(np.int32(2), int(self.length.sum())),
            start=(np.cumsum(self.length) - self.length).astype(np.int64),
            length=self.length,
            lcp=lcp,
            params=np.zeros(count, np.int32),
            sampling=(SamplingParams(n=self.n, max_tokens=self.max_tokens),),
        )


def cases() -> Iterator[Case]:
    random = np.random.default_rng(0)
    chat = np.clip(np.exp(random.normal(np.log(150), 0.9, 20_000)), 4, 4000).astype(np.int32)
    yield Case("32 prompts of 1,000 (900 common) x 512, 200 out", np.full(32, 1000, np.int32), 900, 512, 200, Unstopped())
    yield Case("20,000 chats, 200 out", chat, 0, 1, 200, Unstopped())
    yield Case("20,000 chats, about 200 out", chat, 0, 1, 1024, lognormal(200, 0.7))
    yield Case("the same, small cache", chat, 0, 1, 1024, lognormal(200, 0.7), cache_tokens=600_000)
    yield Case("3,000 summaries: 2,000 in, about 300 out", np.full(3000, 2000, np.int32), 0, 1, 600, lognormal(300, 0.5))
    yield Case("2,000 labels: 4,000 in, 64 out", np.full(2000, 4000, np.int32), 0, 1, 64, Unstopped(), max_running=1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch-ms", type=float, nargs="+", default=[0.0, 3.0])
    args = parser.parse_args()
    roofline = Roofline(LLAMA_1B, H200)
    print("| workload | ms a step | " + " | ".join(f"{budget:,}" for budget in BUDGETS) + " | chosen |")
    print("|---" * (len(BUDGETS) + 3) + "|")
    for case in cases():
        requests = case.requests()
        longest = int(case.length.max()) + case.max_tokens
        for launch in args.launch_ms:
            cost = Profile(roofline, (launch / 1000, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
            seconds: list[str] = []
            for budget in BUDGETS:
                limits = SchedulerLimits(
                    page_size=PAGE,
                    num_pages=case.cache_tokens // PAGE,
                    max_running=case.max_running,
                    max_step_tokens=case.max_running + budget,
                    max_pages_per_sequence=-(-longest // PAGE),
                    grouping=GroupingLimits(4, 2),
                )
                seconds.append(f"{simulate(requests, limits, cost.seconds, case.output).seconds:.2f}")
            print(f"| {case.name} | {launch:g} | {' | '.join(seconds)} | {prefill_tokens(cost.seconds):,} |", flush=True)


if __name__ == "__main__":
    main()
