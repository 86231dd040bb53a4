"""How well the scheduler fills the KV cache when it learns lengths as it goes: python -m benchmarks.foresight

The real scheduler is simulated against the roofline of Llama-3.2-1B on one H200, with a cache that holds far fewer samples
than the running limit, on four traces of output lengths. Four rules decide what is admitted: `oracle` forecasts with the
length of every sample known, `learned` is the scheduler as it is, `prompts fit` admits while there is room for the prompt,
`reserve max` claims max_tokens for every sample. KV use is the time-weighted share of pages in use while samples wait;
waited is the steps that running samples sat out for want of pages over those they ran; recomputed is the share of all computed
tokens that preemptions made it compute again. Figures are deterministic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.forecast.assumed_lengths import DrawnLengths, Lengths, lognormal, uniform
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import Simulation, simulate
from tokabatch.model.spec import ModelSpec, RopeSpec
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.lengths.predictor import LengthPredictor
from tokabatch.scheduling.scheduler import SchedulerLimits

PAGE = 16
LLAMA_1B = ModelSpec(
    family="llama",
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    rms_norm_eps=1e-5,
    rope=RopeSpec(500_000.0),
    context_length=131_072,
    tied_embeddings=True,
)


@dataclass(frozen=True)
class Trace:
    """One workload: prompts of `prompt` tokens, none in common, `samples` of each; a cache of `cache_tokens`."""

    name: str
    prompts: int
    samples: int
    prompt: int
    max_tokens: int
    cache_tokens: int
    lengths: Lengths


@dataclass(frozen=True)
class Grouped:
    """Each prompt has a typical length of its own, log-normal over prompts; its samples spread around that."""

    between: DrawnLengths
    within: DrawnLengths
    """Of mean 1,000: in thousandths of the typical length."""

    def __call__(self, row: Int64, sample: Int32) -> Int32:
        typical = self.between(row, np.zeros_like(sample))
        return np.maximum(typical * self.within(row, sample) / 1000, 1).astype(np.int32)


@dataclass(frozen=True)
class Bimodal:
    """A share of the samples never stops; the others are short."""

    short: DrawnLengths
    endless: float

    def __call__(self, row: Int64, sample: Int32) -> Int32:
        never = uniform(row, sample, 99) < self.endless
        return np.where(never, np.iinfo(np.int32).max, self.short(row, sample)).astype(np.int32)


def pareto(scale: float, shape: float) -> DrawnLengths:
    """Heavy-tailed lengths: Pareto of the second kind."""
    chance = np.linspace(0, 1, 200_001)[:-1]
    return DrawnLengths(np.append(scale * ((1 - chance) ** (-1 / shape) - 1), scale * (200_000 ** (1 / shape) - 1)))


def traces(scale: float) -> list[Trace]:
    def count(number: int) -> int:
        return max(64, int(number * scale))

    return [
        Trace("log-normal", count(30_000), 1, 200, 4096, 1 << 20, lognormal(400, 1.0)),
        Trace("bimodal", count(20_000), 1, 200, 2048, 1 << 20, Bimodal(lognormal(150, 0.6), 0.2)),
        Trace("heavy tail", count(16_000), 1, 200, 32_768, 1 << 21, pareto(900, 1.5)),
        Trace(
            "by group", count(300), 100, 400, 4096, 1 << 20, Grouped(lognormal(400, 0.8, seed=1), lognormal(1000, 0.5, seed=2))
        ),
    ]


class Oracle:
    """An oracle: has the length of every sample."""

    def __init__(self, requests: Requests, lengths: Lengths) -> None:
        self._row, self._lengths = requests.row_index, lengths

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        return np.minimum(self._lengths(self._row[request], sample), limit)

    def observe(self, request: Int32, length: Int32, stopped: Bool) -> None:
        pass

    def refresh(self, request: Int32, generated: Int32) -> bool:
        return False


class ReserveMax(Oracle):
    """Takes every sample to run to its limit."""

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        return limit


class PromptsFit(Oracle):
    """Looks one token ahead."""

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        return generated + 1


Rule = Callable[[Requests, Lengths], "LengthPredictor | None"]
RULES: dict[str, Rule] = {
    "oracle": Oracle,
    "learned": lambda requests, lengths: None,
    "prompts fit": PromptsFit,
    "reserve max": ReserveMax,
}


def requests_of(trace: Trace) -> Requests:
    """The prompts; their tokens take no memory."""
    count = trace.prompts
    return Requests(
        row_index=np.arange(count, dtype=np.int64),
        tokens=np.broadcast_to(np.int32(2), count * trace.prompt),
        start=np.arange(count, dtype=np.int64) * trace.prompt,
        length=np.full(count, trace.prompt, np.int32),
        lcp=np.zeros(count, np.int32),
        params=np.zeros(count, np.int32),
        sampling=(SamplingParams(n=trace.samples, max_tokens=trace.max_tokens),),
    )


def run(trace: Trace, rule: str, max_running: int) -> Simulation:
    requests = requests_of(trace)
    limits = SchedulerLimits(
        page_size=PAGE,
        num_pages=trace.cache_tokens // PAGE,
        max_running=max_running,
        max_step_tokens=max_running + 8192,
        max_pages_per_sequence=-(-(trace.prompt + trace.max_tokens) // PAGE),
        grouping=GroupingLimits(4, 2),
    )
    return simulate(requests, limits, Roofline(LLAMA_1B, H200).seconds, trace.lengths, RULES[rule](requests, trace.lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples of each trace")
    parser.add_argument("--running", type=int, default=8192, help="running limit")
    parser.add_argument("--trace", action="append", help="only these traces")
    parser.add_argument("--rule", action="append", help="only these rules")
    args = parser.parse_args()
    print("| trace | rule | KV use | of oracle's | waited | recomputed | preemptions | output tokens/s | running | steps | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for trace in traces(args.scale):
        if args.trace and trace.name not in args.trace:
            continue
        best = 0.0
        for rule in args.rule or RULES:
            begin = time.perf_counter()
            done = run(trace, rule, args.running)
            best = best or done.kv_use
            running = done.steps["running"][done.steps["waiting"] > 0]
            print(
                f"| {trace.name} | {rule} | {done.kv_use:.1%} | {done.kv_use / best:.1%} | {done.waited:.1%} "
                f"| {done.waste:.2%} | {done.counts.preemptions:,} | {done.output_tokens_per_second:,.0f} "
                f"| {running.mean():,.0f} | {len(done.steps):,} | {time.perf_counter() - begin:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
