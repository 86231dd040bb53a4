"""One long prefix by the Hopper kernel, planned once, as a graph replays it."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from tokabatch.attention.base import KVShape
from tokabatch.attention.capturable import PagedCache, PrefixKind
from tokabatch.engine.graphs import GraphRecorder

PAGE = 16


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "queries", "parts"), [(32, 8, 256, 2), (16, 8, 128, 8)])
def test_a_graph_reads_the_pages_of_the_slot_that_it_is_given(heads, kv_heads, queries, parts):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    module = import_module("tokabatch.attention.hopper_prefix")
    torch.manual_seed(heads)
    dim, pages = 128, 515
    shape = KVShape(1, heads, kv_heads, dim, PAGE, 2 * pages + 1, 2, pages)
    # Three pages are left to others: 512 are a multiple of what a pass takes.
    kind = module.kind_of(shape, 132, queries, pages)
    assert kind == PrefixKind(512, parts)
    assert module.kind_of(shape, 132, 64, pages) is None and module.kind_of(shape, 132, queries, 511) is None
    size = (1, 2 * pages + 1, kv_heads, PAGE, dim)
    k, v = (torch.randn(size, device="cuda").bfloat16() for _ in range(2))
    table = torch.randperm(2 * pages, device="cuda").int().view(2, pages)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    prefix = module.HopperPrefix(kind, queries, PagedCache(k, v, table), shape, workspace)
    slot_1 = torch.zeros(1, dtype=torch.int32, device="cuda")
    q = torch.randn(queries, heads, dim, device="cuda").bfloat16()
    state = torch.full((parts, queries, heads, dim), math.nan, device="cuda").bfloat16()
    lse = torch.full((parts, queries, heads), math.nan, device="cuda")

    def work() -> None:
        prefix.begin(slot_1)
        prefix.attend(0, q, state, lse)

    graph, _ = GraphRecorder().capture(work)
    for slot in (0, 1):
        slot_1.fill_(slot)
        graph.replay()
        ids = table[slot, : kind.pages].long()
        keys, values = (kept[0, ids].transpose(0, 1).flatten(1, 2).repeat_interleave(heads // kv_heads, 0) for kept in (k, v))
        scores = q.transpose(0, 1).double() @ keys.double().transpose(1, 2) / math.sqrt(dim)
        weight = (lse * math.log(2)).softmax(0)[..., None]
        found, expected = (state * weight).sum(0), (scores.softmax(-1) @ values.double()).transpose(0, 1)
        assert (found.double() - expected).norm() / expected.norm() < 1e-2
        torch.testing.assert_close((lse * math.log(2)).logsumexp(0).double(), scores.logsumexp(-1).t(), rtol=1e-3, atol=1e-3)
