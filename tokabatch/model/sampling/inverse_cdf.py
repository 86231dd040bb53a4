"""The inverse of a row's cumulative distribution in token-id order, and the largest of a row, without a pass that
accumulates over the whole vocabulary: sums (or maxima) of chunks first, then a walk through one chunk.

Shape legend: S rows, V vocabulary, N parts of a row, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Protocol

import torch

_CHUNK = 128


class _Reduce(Protocol):
    def __call__(self, x: torch.Tensor, dim: int, /) -> torch.Tensor: ...


def first_argmax(logits_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the largest per row, and its value (NaN where the row has one). Chunk maxima vectorise; argmax does
    not."""
    highest_SN = _per_chunk(logits_SV, torch.amax)
    highest_S, chunk_S = highest_SN.max(-1)
    index_SC, inside_SC = _chunk_indices(chunk_S, logits_SV.shape[1])
    chunk_SC = logits_SV.gather(1, index_SC).masked_fill(~inside_SC, -torch.inf)
    return (chunk_S * _CHUNK + chunk_SC.argmax(-1)).clamp_(max=logits_SV.shape[1] - 1), highest_S


def invert(probs_SV: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """The token whose part of the cumulative distribution holds the uniform number.

    Sums within chunks are the probabilities' dtype, everything that accumulates or subtracts is float64.
    """
    mass_SN = _per_chunk(probs_SV, torch.sum)
    chunk_S, rest_S = locate(mass_SN.double(), uniform_S)
    index_SC, inside_SC = _chunk_indices(chunk_S, probs_SV.shape[1])
    chunk_SC = probs_SV.gather(1, index_SC).double().masked_fill_(~inside_SC, 0.0)
    within_S, _ = locate(chunk_SC, rest_S)
    return (chunk_S * _CHUNK + within_S).clamp_(max=probs_SV.shape[1] - 1)


def locate(mass_SN: torch.Tensor, uniform_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of each row that holds a share `uniform` of its mass, and how far into that part it lies, in [0, 1)."""
    sums_SN = mass_SN.cumsum(-1)
    total_S1 = sums_SN[:, -1:]
    # Below the total even when the product rounds up to it, so that the part found is never one of no mass.
    target_S1 = torch.minimum(uniform_S[:, None] * total_S1, torch.nextafter(total_S1, torch.zeros_like(total_S1)))
    part_S1 = torch.searchsorted(sums_SN, target_S1, right=True).clamp_(max=mass_SN.shape[1] - 1)
    own_S1 = mass_SN.gather(1, part_S1)
    rest_S1 = (target_S1 - (sums_SN.gather(1, part_S1) - own_S1)) / own_S1
    return part_S1[:, 0], rest_S1[:, 0].clamp_(0.0, 1.0)


def _per_chunk(x_SV: torch.Tensor, reduce: _Reduce) -> torch.Tensor:
    """x_SN: every chunk of each row reduced; the last chunk may be short."""
    whole = x_SV.shape[1] // _CHUNK * _CHUNK
    parts: list[torch.Tensor] = []
    if whole:
        parts.append(reduce(x_SV[:, :whole].unflatten(1, (-1, _CHUNK)), -1))
    if whole < x_SV.shape[1]:
        parts.append(reduce(x_SV[:, whole:], -1)[:, None])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _chunk_indices(chunk_S: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of one chunk per row, clamped to the vocabulary, and which of them are inside it."""
    index_SC = chunk_S[:, None] * _CHUNK + torch.arange(_CHUNK, device=chunk_S.device)
    return index_SC.clamp(max=vocab_size - 1), index_SC < vocab_size
