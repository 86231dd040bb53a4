"""The workloads that are measured on a GPU, as `benchmarks.workloads.Workload`: the file every engine reads.

    a       16 prompts of 900 common + 100 own tokens x 512 samples x 200 out
    a-full  128 such prompts x 1,024 samples, lengths drawn around 200
    b       5,000 prompts, log-normal around 214 tokens, 200 out
    b-full  50,000 such prompts, log-normal outputs around 200
    c       one document of 32k tokens, 256 questions of 50 tokens, 64 out
    d       512 prompts of 2,048 tokens with nothing in common, 16 out: nearly all of it is prefill

`scale` shrinks counts and lengths alike, to try the code out. Imports no engine and no torch.

Shape legend: P prompts, N samples a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.workloads import FIRST_PLAIN_TOKEN, Int32, Workload

TEMPERATURE = 0.6
LENGTH_STEP = 8
"""Drawn output lengths are multiples of this: a prompt's samples of one length are one row of the job."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Where a workload's numbers come from. Every length and count is multiplied by `scale` and at least 1."""

    rng: np.random.Generator
    vocab: int
    scale: float

    def size(self, full: int, least: int = 1) -> int:
        return max(least, round(full * self.scale))

    def tokens(self, count: int) -> Int32:
        return self.rng.integers(FIRST_PLAIN_TOKEN, self.vocab, size=count, dtype=np.int32)

    def lengths(self, median: float, sigma: float, limits: tuple[int, int], shape: tuple[int, ...]) -> Int32:
        """Log-normal, clipped to `limits` before scaling."""
        drawn = np.clip(self.rng.lognormal(math.log(median), sigma, size=shape), *limits)
        return np.maximum(1, drawn * self.scale).astype(np.int32)

    def outputs(self, mean: int, sigma: float, limits: tuple[int, int], shape: tuple[int, ...]) -> Int32:
        """Log-normal around `mean`, in steps where lengths are long enough for them."""
        lengths = self.lengths(mean * math.exp(-sigma * sigma / 2), sigma, limits, shape)
        step = LENGTH_STEP if self.scale >= 0.25 else 1
        return np.maximum(step, (lengths + step // 2) // step * step).astype(np.int32)


def make_gpu_workload(name: str, vocab: int, scale: float = 1.0, seed: int = 0) -> Workload:
    """The same for the same arguments. Raises KeyError for an unknown name."""
    drawing = Drawing(np.random.default_rng([seed, sorted(WORKLOADS).index(name)]), vocab, scale)
    prompts, output_length_PN = WORKLOADS[name](drawing)
    return Workload(name, prompts, output_length_PN, TEMPERATURE, seed)


def repeated(draw: Drawing) -> tuple[tuple[Int32, ...], Int32]:
    prompts = _behind_header(draw, draw.size(900), draw.size(16, 2), draw.size(100))
    return prompts, np.full((len(prompts), draw.size(512, 2)), draw.size(200), np.int32)


def repeated_full(draw: Drawing) -> tuple[tuple[Int32, ...], Int32]:
    prompts = _behind_header(draw, draw.size(900), draw.size(128, 2), draw.size(100))
    return prompts, draw.outputs(200, 0.3, (32, 640), (len(prompts), draw.size(1024, 2)))


def chat(draw: Drawing) -> tuple[tuple[Int32, ...], Int32]:
    prompts = _chat_prompts(draw, draw.size(5000, 2))
    return prompts, np.full((len(prompts), 1), draw.size(200), np.int32)


def chat_full(draw: Drawing) -> tuple[tuple[Int32, ...], Int32]:
    prompts = _chat_prompts(draw, draw.size(50_000, 2))
    return prompts, draw.outputs(200, 0.6, (8, 1024), (len(prompts), 1))


def document(draw: Drawing) -> tuple[tuple[Int32, ...], Int32]:
    prompts = _behind_header(draw, draw.size(32_768), draw.size(256, 2), draw.size(50))
    return prompts, np.full((len(prompts), 1), draw.size(64), np.int32)


def long_prompts(draw: Drawing) -> tuple[tuple[Int32, ...], Int32]:
    prompts = tuple(draw.tokens(draw.size(2048)) for _ in range(draw.size(512, 2)))
    return prompts, np.full((len(prompts), 1), draw.size(16), np.int32)


WORKLOADS: dict[str, Callable[[Drawing], tuple[tuple[Int32, ...], Int32]]] = {
    "a": repeated,
    "a-full": repeated_full,
    "b": chat,
    "b-full": chat_full,
    "c": document,
    "d": long_prompts,
}


def _behind_header(draw: Drawing, header: int, prompts: int, own: int) -> tuple[Int32, ...]:
    common = draw.tokens(header)
    return tuple(np.concatenate((common, draw.tokens(own))) for _ in range(prompts))


def _chat_prompts(draw: Drawing, prompts: int) -> tuple[Int32, ...]:
    return tuple(draw.tokens(int(length)) for length in draw.lengths(180, 0.6, (16, 1024), (prompts,)))
