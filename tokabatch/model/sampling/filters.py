"""Top-k, then top-p, then min-p, with the meaning that transformers gives them, and the draw from what they leave.

All three keep the most likely tokens, so each is a bound on the probability. Top-p's bound is found without sorting the
vocabulary: bisection narrows it to a band of probabilities, and only the tokens inside the band are put in order. On the
CPU their number is read to size that work; on a device the whole vocabulary is sorted, so that nothing waits.

Ties: all tokens as likely as the k-th most likely pass top-k; among equals at the edge of top-p those of higher id pass
first, as a stable ascending sort has it.

Shape legend: S rows, V vocabulary, W undecided tokens of the row with the most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokabatch.model.sampling.inverse_cdf import invert

_BISECTIONS = 9


def draw_filtered(
    scaled_SV: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
) -> torch.Tensor:
    """Return token_S, drawn from logits that are already divided by the temperature. `top_k` 0, `top_p` 1 and `min_p` 0 are
    off."""
    on_cpu = scaled_SV.device.type == "cpu"
    probs_SV = scaled_SV.softmax(-1)
    # Masks are held in the probabilities' dtype and multiplied: on the CPU a masked fill takes ten times as long.
    mask_SV = torch.empty_like(probs_SV)
    width = min(scaled_SV.shape[1], int(top_k_S.max())) if on_cpu else scaled_SV.shape[1]
    if width > 0:
        probs_SV.mul_(torch.ge(scaled_SV, _kth_largest(scaled_SV, top_k_S, width), out=mask_SV))
    least_S1 = min_p_S[:, None] * probs_SV.amax(-1, keepdim=True)
    if not on_cpu or bool((top_p_S < 1).any()):
        probs_SV.mul_(_in_top_p(scaled_SV, probs_SV, top_p_S, mask_SV))
    return invert(probs_SV.mul_(torch.ge(probs_SV, least_S1, out=mask_SV)), uniform_S)


def _kth_largest(scaled_SV: torch.Tensor, top_k_S: torch.Tensor, width: int) -> torch.Tensor:
    """Return the k-th largest of each row, [S, 1]; minus infinity where top-k is off. `width` bounds every k."""
    largest_SW = scaled_SV.topk(width, dim=-1).values
    last_S1 = (top_k_S[:, None].long() - 1).clamp_(0, width - 1)
    return largest_SW.gather(1, last_S1).masked_fill_(top_k_S[:, None] <= 0, -torch.inf)


@dataclass(frozen=True, slots=True)
class _Band:
    """Tokens above `high` pass, those up to `low` do not, those in between are undecided."""

    low_S1: torch.Tensor
    high_S1: torch.Tensor
    above_S1: torch.Tensor
    """The mass of the tokens above `high`."""


def _in_top_p(scaled_SV: torch.Tensor, probs_SV: torch.Tensor, top_p_S: torch.Tensor, mask_SV: torch.Tensor) -> torch.Tensor:
    """Return 1 for a token while the more likely tokens before it hold less than top_p of the mass, else 0. `probs_SV` need not
    sum to 1; `mask_SV` is scratch."""
    mass_S1 = probs_SV.sum(-1, keepdim=True)
    wanted_S1 = (top_p_S[:, None].double() * mass_S1).to(probs_SV.dtype)
    band = _narrow(probs_SV, wanted_S1, mass_S1, mask_SV)
    off_S1 = top_p_S[:, None] >= 1
    in_SV = torch.gt(probs_SV, band.high_S1.masked_fill(off_S1, -1.0), out=torch.empty_like(probs_SV))
    undecided_SV = torch.gt(probs_SV, band.low_S1.masked_fill(off_S1, 2.0), out=mask_SV).sub_(in_SV).clamp_(min=0.0)
    id_SW, valid_SW = _compact(undecided_SV)
    scaled_SW = scaled_SV.gather(1, id_SW).masked_fill_(~valid_SW, -torch.inf)
    order_SW = scaled_SW.sort(dim=-1, stable=True).indices.flip(-1)
    mass_SW = probs_SV.gather(1, id_SW).double().masked_fill_(~valid_SW, 0.0).gather(1, order_SW)
    before_SW = band.above_S1 + mass_SW.cumsum(-1) - mass_SW
    keep_SW = (before_SW < wanted_S1) & valid_SW.gather(1, order_SW)
    # Padding points at token 0: adding, not assigning, leaves that token's own mark as it is.
    return in_SV.scatter_add_(1, id_SW.gather(1, order_SW), keep_SW.to(in_SV.dtype))


def _narrow(probs_SV: torch.Tensor, wanted_S1: torch.Tensor, mass_S1: torch.Tensor, mask_SV: torch.Tensor) -> _Band:
    """Bisect the logarithm of top-p's bound."""
    high_S1 = probs_SV.amax(-1, keepdim=True)
    # Tokens below an equal share of what top-p drops are dropped together; the factor is for rounding.
    low_S1 = 0.99 * (mass_S1 - wanted_S1) / probs_SV.shape[1]
    above_S1 = torch.zeros_like(high_S1)
    for _ in range(_BISECTIONS):
        middle_S1 = (low_S1 * high_S1).sqrt_()
        sum_S1 = torch.gt(probs_SV, middle_S1, out=mask_SV).mul_(probs_SV).sum(-1, keepdim=True)
        is_in_S1 = sum_S1 < wanted_S1
        low_S1 = torch.where(is_in_S1, low_S1, middle_S1)
        high_S1 = torch.where(is_in_S1, middle_S1, high_S1)
        above_S1 = torch.where(is_in_S1, sum_S1, above_S1)
    return _Band(low_S1, high_S1, above_S1)


def _compact(marked_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of each row's non-zero places in id order, padded with 0 to W, and which of the W are valid."""
    num_rows, vocab_size = marked_SV.shape
    if marked_SV.device.type != "cpu":
        return torch.arange(vocab_size, device=marked_SV.device).expand(num_rows, vocab_size), marked_SV > 0
    row, column = marked_SV.nonzero().unbind(-1)
    count_S = torch.bincount(row, minlength=num_rows)
    width = max(1, int(count_S.max()))
    place = torch.arange(len(row)) - (count_S.cumsum(0) - count_S)[row]
    id_SW = torch.zeros(num_rows, width, dtype=torch.int64)
    id_SW[row, place] = column
    return id_SW, torch.arange(width) < count_S[:, None]
