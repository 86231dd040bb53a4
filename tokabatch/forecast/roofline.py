"""The roofline of a decoder: the least time that a device's arithmetic and memory bandwidth allow for a step.

Every operator takes the longer of its arithmetic and its memory traffic, and the operators' times add up (Williams, Waterman
and Patterson 2009, applied operator by operator). Caches between operators are not credited, and launches, hosts and imbalance
are not charged: a real step takes longer. Benchmarks and plans share this formula.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from tokabatch.forecast.step_work import Number, StepWork
from tokabatch.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device achieves on large operators: `flops` and `bytes_per_second`."""

    name: str
    flops: float
    bytes_per_second: float


H200 = DeviceRates("NVIDIA H200", flops=790e12, bytes_per_second=4.3e12)
"""Measured: bf16 matrix products of a decoder's shapes, and a device copy."""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a step (or of several, with arrays), by kind of operator."""

    dense: Number
    """The matrix products of all layers."""
    head: Number
    sampling: Number
    elementwise: Number
    """Norms, rotation, cache writes, activations."""
    prefix: Number
    """Attention to shared prefixes, once for each group."""
    prefill: Number
    decode: Number

    @property
    def total(self) -> Number:
        return sum((getattr(self, field.name) for field in fields(self)), 0.0)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The cost model of `spec` on `device`, with weights and cache in numbers of `itemsize` bytes. Source: see the module."""

    spec: ModelSpec
    device: DeviceRates
    itemsize: int = 2

    def seconds(self, work: StepWork) -> Number:
        """Return the least time of a step; an array if `work` holds arrays."""
        return self.by_operator(work).total

    def by_operator(self, work: StepWork) -> StepSeconds:
        """Return the same time by kind of operator."""
        spec, layers = self.spec, self.spec.num_layers
        wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        hidden, inner = spec.hidden_size, spec.intermediate_size
        matrices = ((hidden, wide + 2 * narrow), (wide, hidden), (hidden, 2 * inner), (inner, hidden))
        moved = 2 * hidden * 4 + 2 * (wide + narrow) + 4 * narrow + 3 * inner
        logits = work.sampled * spec.vocab_size
        return StepSeconds(
            dense=layers * sum((self._product(work.tokens, *shape) for shape in matrices), 0.0),
            head=self._product(work.sampled, hidden, spec.vocab_size),
            sampling=self._longer(0.0, logits),
            elementwise=self._longer(0.0, layers * moved * work.tokens),
            prefix=layers * self._attention(work.prefix_pairs, work.prefix_kv),
            prefill=layers * self._attention(work.prefill_pairs, work.prefill_kv),
            decode=layers * self._attention(work.decode_kv, work.decode_kv),
        )

    def _product(self, rows: Number, num_in: int, num_out: int) -> Number:
        """Return the seconds of multiplying `rows` vectors by one matrix; without rows the matrix is not read."""
        return self._longer(2.0 * rows * num_in * num_out, num_in * num_out * np.minimum(rows, 1.0) + rows * (num_in + num_out))

    def _attention(self, pairs: Number, kv: Number) -> Number:
        spec = self.spec
        return self._longer(4.0 * spec.num_heads * spec.head_dim * pairs, 2.0 * spec.num_kv_heads * spec.head_dim * kv)

    def _longer(self, flops: Number, numbers: Number) -> Number:
        return np.maximum(flops / self.device.flops, numbers * (self.itemsize / self.device.bytes_per_second))
