"""A step's tiles, and what the decode kernel reads and merges, against dense attention, on the steps that the scheduler makes.

The plan is read by numpy in float64; the kernels run on a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partialmethod
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import token_device as device
from support.interpreter import DEVICES, INTERPRETING

from tokabatch.attention import tiles as tiles_module
from tokabatch.attention.base import token_slots
from tokabatch.attention.capturable import PagedCache
from tokabatch.attention.tiles import MAX_PLANES, UNMASKED, TilePlan, TileShape, plan_tiles
from tokabatch.scheduling.contracts import PrefixLevel, SamplingParams, SlotInit, StepBatch
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

SLOTS, PAGES = 7, 400
SMALL = {"SHORT_RUN": 2, "LONG_CONTEXT": 3, "SPLIT_KEYS": 2, "SPLIT_STEP": 2}
"""So that runs and contexts of a few tokens are long, and split."""
DTYPE = torch.float16 if INTERPRETING else torch.bfloat16


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    dim: int

    def shape(self, page: int, wide: int = 128, narrow: int = 16, programs: int = 264) -> TileShape:
        group = self.heads // self.kv_heads
        return TileShape(page, self.kv_heads, group, wide, narrow, programs, 4 * programs)


@st.composite
def workloads(draw):
    heads = draw(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=3))
    tails = st.lists(st.integers(0, 3), min_size=1, max_size=9)
    prompts = [draw(st.sampled_from(heads)) + draw(tails) for _ in range(draw(st.integers(1, 5)))]
    return prompts, draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([None, GroupingLimits(1, 1), GroupingLimits(2, 1)]))


class Steps:
    """Drives the scheduler; keeps the page table, and the context of each step's tokens."""

    def __init__(self, prompts: list[list[int]], page: int, grouping: GroupingLimits | None) -> None:
        longest = max(map(len, prompts)) + 6
        self.limits = SchedulerLimits(page, PAGES, SLOTS, 20, -(-longest // page), grouping)
        requests = device.make_requests(prompts, [SamplingParams(n=3, max_tokens=6)])
        self.scheduler = Scheduler(requests, self.limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
        self.tokens = device.TokenDevice(self.limits)
        self.tokens.prompts = prompts
        self.table = np.full((SLOTS + 1, self.limits.max_pages_per_sequence), PAGES, np.int32)

    def __iter__(self):
        while not self.scheduler.done:
            step = self.scheduler.schedule()
            self.table[step.table_slot, step.table_column] = step.table_page
            result = self.tokens.run(step)
            yield step
            self.scheduler.apply(result)


def seen_keys(plan: TilePlan, step: StepBatch) -> list[list[int]]:
    """For every token all keys of its slot that some part of the plan reads for it, and checks that planes are its own."""
    slots, positions = token_slots(step), step.positions()
    keys = [list(range(own, position + 1)) for own, position in zip(plan.own_T.tolist(), positions.tolist(), strict=True)]
    planes: list[list[int]] = [[] for _ in keys]
    for token, queries, slot, begin, end, first, plane, _ in np.concatenate((plan.wide_IW, plan.narrow_IW)).tolist():
        assert begin < end
        for query in range(queries):
            assert first == UNMASKED or slots[token + query] == slot
            last = end - 1 if first == UNMASKED else min(end - 1, first + query)
            keys[token + query] += range(begin, last + 1)
            planes[token + query].append(plane)
    for own, count in zip(planes, plan.planes_T.tolist(), strict=True):
        assert sorted(own) == list(range(count))
    return keys


@settings(max_examples=60, deadline=None)
@given(workload=workloads(), narrow=st.sampled_from([1, 4, 16]), programs=st.sampled_from([1, 8, 264]), low=st.booleans())
def test_every_token_reads_every_key_once(workload, narrow, programs, low):
    prompts, page, grouping = workload
    with pytest.MonkeyPatch.context() as patch:
        if low:
            for name, value in SMALL.items():
                patch.setattr(tiles_module, name, value)
        for step in Steps(prompts, page, grouping):
            plan = plan_tiles(step, Heads(4, 2, 8).shape(page, 4, max(narrow, 2), programs), MAX_PLANES)
            assert plan is not None
            for keys, position in zip(seen_keys(plan, step), step.positions().tolist(), strict=True):
                assert sorted(keys) == list(range(position + 1))


def test_too_many_levels_are_refused_and_few_planes_split_less():
    prompts = [[1] * 60 + [2] * 10, [1] * 60 + [3] * 10]
    for step in Steps(prompts, 4, GroupingLimits(2, 1)):
        plan = plan_tiles(step, Heads(4, 2, 8).shape(4), MAX_PLANES)
        assert plan is not None
        if plan.has_tiles:
            most = int(plan.planes_T.max())
            assert plan_tiles(step, Heads(4, 2, 8).shape(4), most - 1) is None


def attend(
    step: StepBatch, table: np.ndarray, cache: tuple[torch.Tensor, ...], heads: Heads, queries_THD: torch.Tensor, hopper: bool
):
    """What the kernels make of a step whose keys are all in the cache; states that nobody wrote are NaN."""
    triton_tiles, triton_decode = (import_module(f"tokabatch.attention.{name}") for name in ("triton_tiles", "triton_decode"))
    where, page = queries_THD.device, cache[0].shape[2]
    # Tiles of three groups of warps: see `triton_hopper_tiles`.
    rows = {"wide": 192} if hopper and heads.dim == 64 and heads.heads == 3 * heads.kv_heads else {}
    plan = plan_tiles(step, heads.shape(page, **rows), MAX_PLANES)
    assert plan is not None
    wide, narrow = plan.wide_IW, plan.narrow_IW
    head = np.array([len(wide), len(narrow), 4, 4 + wide.size], np.int32)
    work = torch.from_numpy(np.concatenate((head, wide.reshape(-1), narrow.reshape(-1)))).to(where)
    size = (MAX_PLANES, *queries_THD.shape)
    planes = triton_tiles.Planes(
        torch.full(size, math.nan, dtype=queries_THD.dtype, device=where),
        torch.full(size[:-1], math.nan, device=where),
        torch.zeros(2, dtype=torch.int32, device=where),
    )
    tables = torch.from_numpy(table).to(where)
    if plan.has_tiles:
        layer = PagedCache(cache[0][None], cache[1][None], tables)
        kernel = triton_tiles.hopper_tiles(layer, heads.heads, DTYPE, 2) if hopper else None
        assert (kernel is not None) == hopper
        triton_tiles.attend_tiles(0, queries_THD, layer, work, planes, 2, kernel)
    columns = (token_slots(step), step.positions().astype(np.int32), plan.own_T, plan.planes_T)
    places = tuple(torch.from_numpy(column).to(where) for column in columns)
    out = torch.full_like(queries_THD, math.nan)
    merged = planes if plan.has_tiles else None
    triton_decode.decode_and_merge(queries_THD, cache, tables, places, out, merged)
    assert not planes.counter.any()
    return out


def check_step(
    step: StepBatch, table: np.ndarray, cache: tuple[torch.Tensor, ...], heads: Heads, *, hopper: bool = False
) -> None:
    where, page = cache[0].device, cache[0].shape[2]
    queries = torch.randn(step.num_tokens, heads.heads, heads.dim, device=where).to(DTYPE)
    out = attend(step, table, cache, heads, queries, hopper)
    for token, (slot, position) in enumerate(zip(token_slots(step).tolist(), step.positions().tolist(), strict=True)):
        at = np.arange(position + 1)
        pages, offset = torch.from_numpy(table[slot, at // page]).long().to(where), torch.from_numpy(at % page).to(where)
        k, v = (values[pages, :, offset].double().repeat_interleave(heads.heads // heads.kv_heads, 1) for values in cache)
        scores = torch.einsum("hd,lhd->hl", queries[token].double(), k) / math.sqrt(heads.dim)
        expected = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
        torch.testing.assert_close(out[token].double(), expected, rtol=2e-2, atol=2e-2)


def make_cache(heads: Heads, page: int, pages: int, kv_dtype: torch.dtype, where: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(pages, heads.kv_heads, page, heads.dim, device=where).to(kv_dtype) for _ in range(2))


SHAPES = [Heads(6, 2, 64), Heads(4, 2, 24), Heads(8, 1, 128)]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("kv_dtype", [DTYPE, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_kernels_equal_dense_attention(where, heads, kv_dtype, split, monkeypatch):
    if split:
        for name, value in SMALL.items():
            monkeypatch.setattr(tiles_module, name, value)
    torch.manual_seed(heads.dim)
    prompts = [[1] * 22 + [2] * 3, [1] * 22 + [3] * 9, [1] * 12 + [2] * 4, [3] * 5]
    for page in (4, 16):
        cache = make_cache(heads, page, PAGES + 1, kv_dtype, where)
        steps = Steps(prompts, page, GroupingLimits(2, 1))
        for count, step in enumerate(steps):
            if not INTERPRETING or count % 8 == 1:
                check_step(step, steps.table, cache, heads)


def one_slot_step(start: int, length: int, prefill: bool, groups: int, page: int) -> StepBatch:
    """One run of a slot, or `groups` slots that share all full pages before their own."""
    runs = np.arange(groups, dtype=np.int32)
    none, full = np.zeros(0, np.int32), start // page
    level = PrefixLevel(*(np.array([value], np.int32) for value in (0, groups, 0, 0, full)))
    return StepBatch(
        0, None, none, none, none, none, none, none, int(prefill), runs, np.full(groups, start, np.int32),
        np.full(groups, length, np.int32), np.ones(groups, np.bool_), np.full(groups, full if groups > 1 else 0, np.int32),
        np.zeros(length if prefill else 0, np.int32), (level,) if groups > 1 else (),
    )  # fmt: skip


LONG = pytest.mark.parametrize(
    "step",
    [
        one_slot_step(0, 70, True, 1, 16),
        one_slot_step(1500, 40, True, 1, 16),
        one_slot_step(1100, 1, False, 50, 16),
        one_slot_step(1500, 1, False, 1, 16),
    ],
    ids=["prompt", "prompt-behind-context", "group", "alone"],
)


@pytest.mark.parametrize("where", DEVICES)
@LONG
def test_long_ranges_equal_dense_attention(where, step):
    """Tiles of many blocks, causal and split along their keys."""
    torch.manual_seed(0)
    heads = Heads(6, 2, 64)
    cache = make_cache(heads, 16, 200, DTYPE, where)
    table = np.tile(np.arange(100, dtype=np.int32), (len(step.run_slot), 1))
    check_step(step, table, cache, heads)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@LONG
@pytest.mark.parametrize("heads", [Heads(6, 2, 64), Heads(8, 1, 128)], ids=str)
def test_the_kernel_for_hopper_computes_long_ranges(step, heads):
    needs_hopper()
    torch.manual_seed(0)
    cache = make_cache(heads, 16, 200, DTYPE, "cuda")
    table = np.tile(np.arange(100, dtype=np.int32), (len(step.run_slot), 1))
    check_step(step, table, cache, heads, hopper=True)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [8, 16, 64])
@pytest.mark.parametrize("heads", [Heads(6, 2, 64), Heads(4, 4, 64), Heads(8, 1, 128), Heads(4, 2, 128)], ids=str)
def test_the_kernel_for_hopper_equals_dense_attention(heads, page, monkeypatch):
    """Every kind of pass, causal ones and parts of a block included: all tiles are wide here."""
    needs_hopper()
    for name, value in {**SMALL, "SPLIT_STEP": page}.items():
        monkeypatch.setattr(tiles_module, name, value)
    monkeypatch.setattr(Heads, "shape", partialmethod(Heads.shape, narrow=0))
    torch.manual_seed(heads.dim)
    prompts = [[1] * 150 + [2] * 3, [1] * 150 + [3] * 90, [1] * 12 + [2] * 4, [3] * 5]
    cache = make_cache(heads, page, PAGES + 1, DTYPE, "cuda")
    steps = Steps(prompts, page, GroupingLimits(2, 1))
    for step in steps:
        check_step(step, steps.table, cache, heads, hopper=True)


def decoding_step(own: int, skip: int, count: int, levels: tuple[PrefixLevel, ...]) -> StepBatch:
    """`count` samples of one token each, `skip` pages of which their levels read."""
    zero = np.zeros(count, np.int32)
    return StepBatch(
        index=0, inits=SlotInit(*(np.zeros(0, np.int32) for _ in fields(SlotInit))), table_slot=zero[:0], table_column=zero[:0],
        table_page=zero[:0], clear_pages=zero[:0], copy_src=zero[:0], copy_dst=zero[:0], num_prefill_runs=0,
        run_slot=np.arange(count, dtype=np.int32), run_start=zero + 16 * skip + own, run_length=zero + 1,
        run_samples=np.ones(count, np.bool_), run_skip=zero + skip, token_ids=zero[:0], prefix_levels=levels,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "groups", "queries", "planes"), [((32, 8), 16, 512, 1), ((9, 3), 128, 64, 2)])
def test_groups_that_fill_tiles_read_what_is_in_front_of_theirs(heads, groups, queries, planes):
    """512 samples a prompt do behind 56 pages that all prompts share; 64 with a group of 3 heads, which leave a third of their
    tiles empty, do not."""
    first = np.arange(groups, dtype=np.int32) * queries
    shared, own = np.full(groups, 56, np.int32), np.full(groups, 62, np.int32)
    levels = (
        PrefixLevel(*(np.array([value], np.int32) for value in (0, groups * queries, 0, 0, 56))),
        PrefixLevel(first, first + queries, first, shared, own),
    )
    step = decoding_step(33, 62, groups * queries, levels)
    plan = plan_tiles(step, Heads(*heads, 64).shape(16), MAX_PLANES)
    assert plan is not None and (plan.planes_T == planes).all()
    assert sorted(seen_keys(plan, step)[-1]) == list(range(62 * 16 + 34))


def test_few_queries_over_many_keys_are_one_tile_for_each_program():
    """256 samples behind a document of 32k tokens: four ranges fill 256 of 264 programs, five would take a second turn."""
    level = PrefixLevel(*(np.array([value], np.int32) for value in (0, 256, 0, 0, 2048)))
    step = decoding_step(32, 2048, 256, (level,))
    plan = plan_tiles(step, Heads(32, 8, 64).shape(16), MAX_PLANES)
    assert plan is not None and len(plan.wide_IW) == 32 and (plan.planes_T == 4).all()
    assert (plan.wide_IW[:, 4] - plan.wide_IW[:, 3] == 8192).all()
