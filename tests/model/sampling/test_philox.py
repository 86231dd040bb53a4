"""Philox-4x32-10 against the known answers that its authors publish with Random123."""

from __future__ import annotations

import pytest
import torch

from tokabatch.model.sampling.philox import philox, uniform

KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_known_answers(key, counter, expected):
    words = philox(tuple(torch.tensor([x]) for x in key), tuple(torch.tensor([x]) for x in counter))
    assert tuple(int(word) for word in words) == expected


def test_uniform_is_uniform_and_every_argument_counts():
    n = 200_000
    counting, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    for arguments in (
        (counting, zero, zero, zero),
        (zero, counting, zero, zero),
        (zero, zero, counting.int(), zero),
        (zero, zero, zero, counting.int()),
        (counting << 32, zero, zero, zero),
        (zero, counting << 32, zero, zero),
    ):
        u = uniform(*arguments)
        assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
        assert len(u.unique()) == n
        histogram = torch.histc(u, 100, 0, 1)
        chi_square = ((histogram - n / 100) ** 2 / (n / 100)).sum()
        assert 52 < chi_square < 165  # 99 degrees of freedom; each side about 1e-5
        assert abs(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1]) < 0.012


def test_negative_seeds_are_64_bit_keys():
    one = torch.ones(1, dtype=torch.int64)
    assert uniform(-one, one, one, one) != uniform(one, one, one, one)
    assert uniform(-one, one, one, one) != uniform(torch.tensor([0xFFFFFFFF]), one, one, one)
