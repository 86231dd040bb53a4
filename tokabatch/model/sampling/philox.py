"""Random numbers without state: Philox-4x32-10, a keyed hash of a counter.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The same arguments
give the same bits on every device. GPU kernels, which cannot call torch, have their own version (`triton_rows.uniform_of`, on
Triton's Philox).

Shape legend: S rows.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox(
    key_S: tuple[torch.Tensor, torch.Tensor],
    counter_S: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return four 32-bit words per row. All tensors are int64 and hold values below 2**32."""
    key_0, key_1 = key_S
    word_0, word_1, word_2, word_3 = counter_S
    for turn in range(_ROUNDS):
        # A 64-bit product wraps in int64, which leaves its bits right; the mask undoes the shift's sign extension.
        low = word_0 * _MULTIPLIERS[0]
        high = word_2 * _MULTIPLIERS[1]
        round_0 = (key_0 + turn * _KEY_STEPS[0]) ^ word_1
        round_1 = (key_1 + turn * _KEY_STEPS[1]) ^ word_3
        word_0 = (high >> 32).bitwise_xor_(round_0).bitwise_and_(_MASK)
        word_2 = (low >> 32).bitwise_xor_(round_1).bitwise_and_(_MASK)
        word_1 = high.bitwise_and_(_MASK)
        word_3 = low.bitwise_and_(_MASK)
    return word_0, word_1, word_2, word_3


def uniform(seed_S: torch.Tensor, row_S: torch.Tensor, sample_S: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """Return one float64 in [0, 1) per row, a multiple of 2**-53. The seed is the key; the counter is position, sample, row."""
    seed, row = seed_S.long(), row_S.long()
    word_0, word_1, _, _ = philox(
        (seed & _MASK, (seed >> 32) & _MASK),
        (position_S.long() & _MASK, sample_S.long() & _MASK, row & _MASK, (row >> 32) & _MASK),
    )
    return ((word_0 << 21) | (word_1 >> 11)).double().mul_(2.0**-53)
