"""Lengths of simulated samples, from keyed sources: a sample has the same length in every simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Float64, Int32, Int64


class Lengths(Protocol):
    """Gives the output tokens until a sample stops by itself; the simulation cuts them at max_tokens."""

    def __call__(self, row: Int64, sample: Int32) -> Int32:
        """Return the lengths of N samples, at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Unstopped:
    """No sample stops by itself: all run to max_tokens."""

    def __call__(self, row: Int64, sample: Int32) -> Int32:
        return np.full(len(row), np.iinfo(np.int32).max, np.int32)


@dataclass(frozen=True, slots=True)
class DrawnLengths:
    """Lengths from a distribution given by `quantiles`: the values at evenly spaced probabilities from 0 to 1, interpolated."""

    quantiles: Float64
    seed: int = 0

    def __call__(self, row: Int64, sample: Int32) -> Int32:
        chance = uniform(row, sample, self.seed)
        grid = np.linspace(0.0, 1.0, len(self.quantiles))
        return np.maximum(np.rint(np.interp(chance, grid, self.quantiles)), 1).astype(np.int32)


def lognormal(mean: float, sigma: float, seed: int = 0) -> DrawnLengths:
    """Return log-normal lengths with this mean; `sigma` is the standard deviation of their logarithm."""
    normal = np.sort(np.random.default_rng(0).standard_normal(100_001))
    values = np.exp(sigma * normal)
    return DrawnLengths(values * (mean / values.mean()), seed)


def observed(lengths: Int32) -> DrawnLengths:
    """Return lengths distributed like those of an earlier run."""
    return DrawnLengths(np.quantile(lengths, np.linspace(0.0, 1.0, min(len(lengths), 100_001))))


def uniform(row: Int64, sample: Int32, seed: int) -> Float64:
    """Return a number in [0, 1) for each key: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied twice."""
    with np.errstate(over="ignore"):
        mixed = _mix(row.astype(np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15))
        mixed = _mix(mixed ^ (sample.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03))
    return (mixed >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
