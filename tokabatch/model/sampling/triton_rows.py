"""What the GPU's sampling kernels share: a row's record, its uniform number, and logits as integers that sort as they do.

The device functions are inlined where they are called. Imports triton: only its siblings named `triton_*` load it.

Shape legend: S rows, V vocabulary, N parts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from tokabatch.model import partition
from tokabatch.model.sampling.slot_table import WORDS, SamplerInputs

PART = tl.constexpr(partition.PART)
"""Logits that are summed up together."""
_WORDS = tl.constexpr(WORDS)
_COLDEST = tl.constexpr(1e-30)
_SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's logits, whose each they are, and how they and their summaries lie in memory. Where the vocabulary is spread
    over ranks `logits_SV` are the `own_vocab` of this one, which begin with part `first_part`; parts are those of all ranks."""

    logits_SV: torch.Tensor
    vocab: int
    own_vocab: int
    first_part: int
    words: torch.Tensor
    slot_S: torch.Tensor
    row_stride: int
    num_parts: int
    part_stride: int
    """Summaries from row to row: rows are aligned alike whatever their number."""
    width: int
    """A power of two, at least `num_parts`."""
    shift: int
    """See `key_of`."""

    @classmethod
    def of(cls, logits_SV: torch.Tensor, inputs: SamplerInputs, shard: partition.VocabularyShard) -> Rows:
        if logits_SV.stride(1) != 1:
            logits_SV = logits_SV.contiguous()
        num_parts = triton.cdiv(shard.vocab_size, PART.value)
        part_stride = triton.cdiv(num_parts, 16) * 16
        if shard.mesh.tensor_size > 1:
            part_stride = shard.width // PART.value * shard.mesh.tensor_size
        return cls(
            logits_SV=logits_SV,
            vocab=shard.vocab_size,
            own_vocab=len(shard.tokens),
            first_part=shard.tokens.start // PART.value,
            words=inputs.table.words,
            slot_S=inputs.slot_S,
            row_stride=logits_SV.stride(0) if len(logits_SV) > 1 else logits_SV.shape[1],
            num_parts=num_parts,
            part_stride=part_stride,
            width=triton.next_power_of_2(num_parts),
            shift=_SHIFTS[logits_SV.dtype],
        )

    @property
    def num_warps(self) -> int:
        """For kernels that hold all of a row's summaries in registers."""
        return 4 if self.width < 1024 else 8

    def summary(self, dtype: torch.dtype) -> torch.Tensor:
        """Space for one value per row and part."""
        return torch.empty((self.logits_SV.shape[0], self.part_stride), dtype=dtype, device=self.logits_SV.device)


@triton.jit
def record_of(words_ptr, slot_ptr, row):
    """The address of a row's record; see `slot_table.RECORD` for the words of it."""
    return words_ptr + tl.load(slot_ptr + row).to(tl.int64) * _WORDS


@triton.jit
def temperature_of(record):
    return tl.load(record + 5).to(tl.float32, bitcast=True)


@triton.jit
def filters_of(record):
    """top_p, min_p and top_k."""
    top_p = tl.load(record + 6).to(tl.float32, bitcast=True)
    min_p = tl.load(record + 7).to(tl.float32, bitcast=True)
    # No token is more likely than the most likely one.
    return top_p, tl.minimum(min_p, 1.0), tl.load(record + 8)


@triton.jit
def logprobs_of(record):
    return tl.load(record + 9)


@triton.jit
def is_filtered(record):
    """Whether the row is drawn from fewer tokens than it has."""
    top_p, min_p, top_k = filters_of(record)
    return (temperature_of(record) > 0) & ((top_p < 1.0) | (min_p > 0.0) | (top_k > 0))


@triton.jit
def inverse_temperature(temperature):
    """1 for a greedy row, whose masses only show whether it is finite."""
    return tl.where(temperature > 0, 1.0 / tl.maximum(temperature, _COLDEST), 1.0)


@triton.jit
def uniform_of(record, position):
    """`philox.uniform` once more, as a kernel cannot call torch, and bit for bit the same: a float64 in [0, 1)."""
    seed_low, seed_high = tl.load(record).to(tl.uint32, bitcast=True), tl.load(record + 1).to(tl.uint32, bitcast=True)
    row_low, row_high = tl.load(record + 2).to(tl.uint32, bitcast=True), tl.load(record + 3).to(tl.uint32, bitcast=True)
    sample = tl.load(record + 4).to(tl.uint32, bitcast=True)
    at = position.to(tl.int32).to(tl.uint32, bitcast=True)
    first, second, _, _ = philox_impl(at, sample, row_low, row_high, seed_low, seed_high)
    bits = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
    return bits.to(tl.float64) * (2.0**-53)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """An int32 that sorts as the float32 does, both zeros alike. SHIFT drops the bits that a 16-bit logit leaves empty:
    16 for bfloat16, 13 for float16, so that neighbouring keys are neighbouring logits."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 of a key."""
    wide = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def finite_or_zero(x):
    """The base that exponents are taken against: a part, or a row, may hold nothing finite."""
    return tl.where((x > float("-inf")) & (x < float("inf")), x, 0.0)
