"""The named workloads: prompts, samples a prompt and, for every sample, how many tokens it must emit.

A workload fixes the output length of each sample, so that every engine does the same work whatever it happens
to draw; end-of-sequence tokens are ignored. It knows no engine, no model beyond its vocabulary size, and no
torch. The same name, parameters and seed give the same workload on any machine.

Shape legend: P prompts, N samples a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

FIRST_PLAIN_TOKEN = 4
"""Token ids below this are left to padding and the like; no prompt holds them."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a workload can be scaled by; a name takes its own defaults where a field is None."""

    prompts: int | None = None
    n: int | None = None
    header: int | None = None
    prompt: int | None = None
    output: int | None = None
    vocab_size: int = 8192
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt (its index) that have one output length."""

    prompt: int
    output_length: int
    samples: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Sample s of prompt p emits `output_length_PN[p, s]` tokens; samples are numbered p * n + s everywhere."""

    name: str
    prompts: tuple[Int32, ...]
    output_length_PN: Int32
    temperature: float = 1.0
    seed: int = 0

    @property
    def n(self) -> int:
        return int(self.output_length_PN.shape[1])

    @property
    def num_samples(self) -> int:
        return int(self.output_length_PN.size)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many samples it has."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return int(self.output_length_PN.sum())

    @property
    def longest(self) -> int:
        """Positions of the longest prompt together with its longest sample."""
        return max(len(prompt) + int(out.max()) for prompt, out in zip(self.prompts, self.output_length_PN, strict=True))

    def common_prefix(self) -> int:
        """Leading tokens that all prompts share, leaving at least one token of every prompt outside."""
        limit = min(len(prompt) for prompt in self.prompts) - 1
        head_PL = np.stack([prompt[:limit] for prompt in self.prompts])
        differs_L = (head_PL != head_PL[0]).any(axis=0)
        return int(differs_L.argmax()) if differs_L.any() else limit

    def groups(self) -> Iterator[Group]:
        """All samples, those that can be one request together."""
        for prompt, lengths in enumerate(self.output_length_PN):
            for length, samples in zip(*np.unique(lengths, return_counts=True), strict=True):
                yield Group(prompt, int(length), int(samples))

    def take(self, prompts: int) -> Workload:
        """The first prompts with all their samples; they are drawn alike, so this is a fair, smaller copy."""
        return replace(self, prompts=self.prompts[:prompts], output_length_PN=self.output_length_PN[:prompts])

    def greedy(self, prompts: int, tokens: int) -> Workload:
        """A small deterministic copy: one sample a prompt at temperature 0, lengths falling from `tokens`, unequal
        so that rows finish at different times."""
        few = self.take(prompts)
        lengths = np.array([[max(1, tokens - 3 * index)] for index in range(len(few.prompts))], dtype=np.int32)
        return replace(few, output_length_PN=lengths, temperature=0.0)

    def save(self, file: Path) -> None:
        np.savez(
            file,
            name=np.array(self.name),
            tokens=np.concatenate(self.prompts),
            length=np.array([len(prompt) for prompt in self.prompts], dtype=np.int64),
            output_length=self.output_length_PN,
            temperature=np.array(self.temperature),
            seed=np.array(self.seed),
        )

    @staticmethod
    def load(file: Path) -> Workload:
        with np.load(file) as data:
            ends = np.cumsum(data["length"])[:-1]
            return Workload(
                name=str(data["name"]),
                prompts=tuple(np.split(data["tokens"], ends)),
                output_length_PN=data["output_length"],
                temperature=float(data["temperature"]),
                seed=int(data["seed"]),
            )


def make_workload(name: str, parameters: Parameters) -> Workload:
    """Raises KeyError for an unknown name."""
    return WORKLOADS[name](parameters)


def repeated_sampling(parameters: Parameters) -> Workload:
    """Few prompts behind one few-shot header, many samples of each."""
    rng = np.random.default_rng(parameters.seed)
    prompts, n = parameters.prompts or 64, parameters.n or 16
    header = draw_tokens(rng, _given(parameters.header, 300), parameters)
    own_P = draw_lengths(rng, _given(parameters.prompt, 40), 0.3, (8, 160), (prompts,))
    return Workload(
        name="repeated-sampling",
        prompts=tuple(np.concatenate([header, draw_tokens(rng, int(own), parameters)]) for own in own_P),
        output_length_PN=draw_lengths(rng, _given(parameters.output, 64), 0.5, (4, 512), (prompts, n)),
        seed=parameters.seed,
    )


def mixed_lengths(parameters: Parameters) -> Workload:
    """Chat-like: prompts and outputs log-normal, nothing shared, not even the first token of most prompts."""
    rng = np.random.default_rng(parameters.seed + 1)
    prompts, n = parameters.prompts or 320, parameters.n or 1
    length_P = draw_lengths(rng, _given(parameters.prompt, 128), 0.7, (8, 1024), (prompts,))
    return Workload(
        name="mixed-lengths",
        prompts=tuple(draw_tokens(rng, int(length), parameters) for length in length_P),
        output_length_PN=draw_lengths(rng, _given(parameters.output, 96), 0.7, (4, 768), (prompts, n)),
        seed=parameters.seed,
    )


def long_document(parameters: Parameters) -> Workload:
    """One long document, many questions about it."""
    rng = np.random.default_rng(parameters.seed + 2)
    prompts, n = parameters.prompts or 64, parameters.n or 1
    document = draw_tokens(rng, _given(parameters.header, 2048), parameters)
    own_P = draw_lengths(rng, _given(parameters.prompt, 24), 0.3, (4, 128), (prompts,))
    return Workload(
        name="long-document",
        prompts=tuple(np.concatenate([document, draw_tokens(rng, int(own), parameters)]) for own in own_P),
        output_length_PN=draw_lengths(rng, _given(parameters.output, 48), 0.4, (4, 256), (prompts, n)),
        seed=parameters.seed,
    )


WORKLOADS: dict[str, Callable[[Parameters], Workload]] = {
    "repeated-sampling": repeated_sampling,
    "mixed-lengths": mixed_lengths,
    "long-document": long_document,
}


def draw_tokens(rng: np.random.Generator, count: int, parameters: Parameters) -> Int32:
    return rng.integers(FIRST_PLAIN_TOKEN, parameters.vocab_size, size=count, dtype=np.int32)


def draw_lengths(rng: np.random.Generator, mean: int, sigma: float, limits: tuple[int, int], shape: tuple[int, ...]) -> Int32:
    """Log-normal lengths of the given mean (before clipping to `limits`); `sigma` is that of the logarithm."""
    drawn = rng.lognormal(math.log(max(mean, 1)) - sigma * sigma / 2, sigma, size=shape)
    return np.clip(np.rint(drawn), *limits).astype(np.int32)


def _given(value: int | None, default: int) -> int:
    return default if value is None else value
