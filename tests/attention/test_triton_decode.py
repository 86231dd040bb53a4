"""The decode kernel against dense attention in float64: group sizes, head sizes, page sizes, prior states, e4m3 pages."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from support.interpreter import DEVICES, INTERPRETING

PAGES, COLUMNS = 600, 40
DTYPE = torch.float16 if INTERPRETING else torch.bfloat16
"""The interpreter multiplies the bits of bfloat16 matrices."""


def dense(q_HD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query, and its log-sum-exp in base 2."""
    group = len(q_HD) // k_LKD.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k_LKD, v_LKD))
    scores = torch.einsum("hd,lhd->hl", q_HD.double(), k) / math.sqrt(q_HD.shape[1])
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), v), scores.logsumexp(-1) / math.log(2)


HEADS = [(16, 8, 128, 64), (5, 5, 24, 4), (32, 8, 64, 16), (28, 4, 128, 16)]
"""Query heads, key-value heads, head size and page size."""
if INTERPRETING:
    # Two key-value heads: a program takes one of them, and the interpreter runs one program after another.
    HEADS = [(4, 2, 128, 64), (2, 2, 24, 4)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prior", ["none", "some"])
@pytest.mark.parametrize("kv_dtype", [DTYPE, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), HEADS)
def test_decode_equals_dense_attention(device, heads, kv_heads, dim, page, kv_dtype, prior):
    torch.manual_seed(dim)
    count = 9
    q = torch.randn(count, heads, dim, device=device).to(DTYPE)
    k, v = (torch.randn(PAGES, kv_heads, page, dim, device=device).to(kv_dtype) for _ in range(2))
    table = torch.randint(0, PAGES, (count + 2, COLUMNS), device=device).int()
    slot = torch.randperm(count + 2, device=device)[:count].int()
    ends = [0, 1, page - 1, page, 3 * page + 1, 100, 129, 5 * page, COLUMNS * page - 1]
    position = torch.tensor([min(end, COLUMNS * page - 1) for end in ends], device=device).int()
    skip = torch.tensor([0, 0, 0, 1, 2, 0, 1, 0, 7], device=device).int().minimum(position // page)

    def context(i: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(start, stop, device=device)
        pages = table[int(slot[i]), at // page].long()
        return k[pages, :, at % page].float(), v[pages, :, at % page].float()

    out = torch.full_like(q, math.nan)
    lse = torch.full((count, heads), -math.inf, device=device)
    expected = torch.empty(q.shape, dtype=torch.float64, device=device)
    for i in range(count):
        begin, end = int(skip[i]) * page, int(position[i]) + 1
        start = begin
        if prior == "some" and begin:
            state = dense(q[i], *context(i, 0, begin))
            out[i], lse[i], start = state[0], state[1], 0
        expected[i] = dense(q[i], *context(i, start, end))[0]
    cache = k, v
    decode = import_module("tokabatch.attention.triton_decode").decode
    decode(q, cache, table, slot, position, skip, out, lse if prior == "some" else None)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
