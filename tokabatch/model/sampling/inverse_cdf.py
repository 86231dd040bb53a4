"""The inverse of a row's cumulative distribution in token-id order, and the largest of a row, without a pass that
accumulates over the whole vocabulary: sums and maxima of parts first, then a walk through one part.

The parts' sums are all that a draw takes of the tokens outside of the part that it falls into: where a vocabulary is spread
over ranks, they alone are exchanged.

Shape legend: S rows, V vocabulary, N parts of a row, C tokens of a part.
"""

from __future__ import annotations

import torch

from tokabatch.model.partition import PART


def part_maxima(logits_SV: torch.Tensor) -> torch.Tensor:
    """Return the largest of each part, [S, N]; NaN if it contains one. The last part may be short."""
    return _joined([part.amax(-1) for part in _parts(logits_SV)], logits_SV)


def part_masses(logits_SV: torch.Tensor, highest_SN: torch.Tensor, temperature_S1: torch.Tensor) -> torch.Tensor:
    """Return the sum of exp((x - highest of the part) / temperature) of each part, [S, N]."""
    base_SN1 = highest_SN.masked_fill(highest_SN == -torch.inf, 0.0)[:, :, None]
    masses: list[torch.Tensor] = []
    begin = 0
    for part in _parts(logits_SV):
        below = torch.sub(part, base_SN1[:, begin : begin + part.shape[1]])
        masses.append(below.div_(temperature_S1[:, :, None]).exp_().sum(-1))
        begin += part.shape[1]
    return _joined(masses, logits_SV)


def relative_masses(mass_SN: torch.Tensor, highest_SN: torch.Tensor, temperature_S1: torch.Tensor) -> torch.Tensor:
    """Return the masses of the parts of whole rows on one scale, that of the row's largest logit; float64."""
    top_S1 = highest_SN.amax(-1, keepdim=True)
    top_S1 = top_S1.masked_fill(~top_S1.isfinite(), 0.0)
    return mass_SN.double() * ((highest_SN - top_S1) / temperature_S1).double().exp_()


def walk(logits_SV: torch.Tensor, part_S: torch.Tensor, rest_S: torch.Tensor, temperature_S1: torch.Tensor) -> torch.Tensor:
    """Return the place in V at which a share `rest` of the mass of one part is passed, [S]."""
    index_SC, inside_SC = _part_indices(part_S, logits_SV.shape[1])
    part_SC = logits_SV.gather(1, index_SC).masked_fill_(~inside_SC, -torch.inf)
    highest_S1 = part_SC.amax(-1, keepdim=True)
    highest_S1.masked_fill_(highest_S1 == -torch.inf, 0.0)
    within_S, _ = locate(part_SC.sub_(highest_S1).div_(temperature_S1).exp_().double(), rest_S)
    return (part_S * PART + within_S).clamp_(max=logits_SV.shape[1] - 1)


def first_of_part(logits_SV: torch.Tensor, part_S: torch.Tensor) -> torch.Tensor:
    """Return the place in V of the first of the largest of one part, [S]."""
    index_SC, inside_SC = _part_indices(part_S, logits_SV.shape[1])
    part_SC = logits_SV.gather(1, index_SC).masked_fill_(~inside_SC, -torch.inf)
    return (part_S * PART + part_SC.argmax(-1)).clamp_(max=logits_SV.shape[1] - 1)


def invert(probs_SV: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """Return the token whose part of the cumulative distribution contains the uniform number. Sums within parts are in the
    probabilities' dtype; everything that accumulates or subtracts is float64."""
    mass_SN = _joined([part.sum(-1) for part in _parts(probs_SV)], probs_SV)
    part_S, rest_S = locate(mass_SN.double(), uniform_S)
    index_SC, inside_SC = _part_indices(part_S, probs_SV.shape[1])
    part_SC = probs_SV.gather(1, index_SC).double().masked_fill_(~inside_SC, 0.0)
    within_S, _ = locate(part_SC, rest_S)
    return (part_S * PART + within_S).clamp_(max=probs_SV.shape[1] - 1)


def locate(mass_SN: torch.Tensor, uniform_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of each row that contains a share `uniform` of its mass, and the position within that part, in [0, 1)."""
    sums_SN = mass_SN.cumsum(-1)
    total_S1 = sums_SN[:, -1:]
    # Below the total even when the product rounds up to it, so that the part found is never one of no mass.
    target_S1 = torch.minimum(uniform_S[:, None] * total_S1, torch.nextafter(total_S1, torch.zeros_like(total_S1)))
    part_S1 = torch.searchsorted(sums_SN, target_S1, right=True).clamp_(max=mass_SN.shape[1] - 1)
    own_S1 = mass_SN.gather(1, part_S1)
    rest_S1 = (target_S1 - (sums_SN.gather(1, part_S1) - own_S1)) / own_S1
    return part_S1[:, 0], rest_S1[:, 0].clamp_(0.0, 1.0)


def _parts(x_SV: torch.Tensor) -> list[torch.Tensor]:
    """Return views [S, N, C] of all whole parts, and of a short last one, as far as they exist."""
    whole = x_SV.shape[1] // PART * PART
    parts: list[torch.Tensor] = []
    if whole:
        parts.append(x_SV[:, :whole].unflatten(1, (-1, PART)))
    if whole < x_SV.shape[1]:
        parts.append(x_SV[:, None, whole:])
    return parts


def _joined(per_part: list[torch.Tensor], x_SV: torch.Tensor) -> torch.Tensor:
    if not per_part:
        return x_SV.new_empty(x_SV.shape[0], 0)
    return per_part[0] if len(per_part) == 1 else torch.cat(per_part, dim=1)


def _part_indices(part_S: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of one part per row, clamped to the vocabulary, and which of them are inside it."""
    index_SC = part_S[:, None] * PART + torch.arange(PART, device=part_S.device)
    return index_SC.clamp(max=vocab_size - 1), index_SC < vocab_size
