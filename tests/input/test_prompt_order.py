"""The plan order against Python's own sort and a token-by-token LCP; what is shared against an explicit prefix tree."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokabatch.input import prompt_order as order_module
from tokabatch.input.prompt_order import Order, Sharing, longest_first, measure_sharing, order_prompts

LARGEST_ID = 2**31 - 1


def flatten(prompts: list[list[int]], gap: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token file with `gap` foreign tokens between prompts, starts and lengths."""
    flat: list[int] = []
    start: list[int] = []
    for prompt in prompts:
        start.append(len(flat))
        flat += prompt + [7] * gap
    length = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    return np.array(flat, dtype=np.int32), np.array(start, dtype=np.int64), length


def naive_lcp(left: list[int], right: list[int]) -> int:
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def check(prompts: list[list[int]], order: Order) -> None:
    expected = sorted(range(len(prompts)), key=lambda row: (prompts[row], row))
    assert order.permutation.tolist() == expected
    assert order.permutation.dtype == np.int64 and order.lcp.dtype == np.int32
    in_order = [prompts[row] for row in expected]
    assert order.lcp.tolist() == [0] * bool(prompts) + [naive_lcp(left, right) for left, right in pairwise(in_order)]


few_tokens = st.lists(st.integers(0, 2), max_size=40)
any_tokens = st.lists(st.integers(0, LARGEST_ID), max_size=12)


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Prompts that extend, repeat and branch off one another at depths around the block widths."""
    prompts = draw(st.lists(any_tokens | few_tokens, min_size=1, max_size=5))
    for _ in range(draw(st.integers(0, 25))):
        parent = draw(st.sampled_from(prompts))
        depth = draw(st.integers(0, len(parent)))
        repeats = draw(st.sampled_from([1, 1, 4, 30]))
        prompts.append(parent[:depth] + draw(few_tokens) * repeats)
    return draw(st.permutations(prompts))


@settings(max_examples=300, deadline=None)
@given(families(), st.integers(0, 1))
def test_equals_the_naive_order(prompts: list[list[int]], gap: int) -> None:
    check(prompts, order_prompts(*flatten(prompts, gap)))


@settings(max_examples=100, deadline=None)
@given(st.lists(few_tokens, max_size=60))
def test_equals_the_naive_order_in_small_blocks(prompts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "_BLOCK_TOKENS", 16)
        patch.setattr(order_module, "_LARGEST_BLOCK", 8)
        check(prompts, order_prompts(*flatten(prompts)))


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [[]],
        [[], [], []],
        [[5]],
        [[5], [5], [5]],
        [[1, 2, 3], [1, 2], [1], []],
        [[LARGEST_ID], [0], [LARGEST_ID, 0]],
        [[9] * 20_000, [9] * 20_000, [9] * 3, [1], [9] * 19_999 + [8]],
        [[4] * size for size in range(200, 0, -1)],
    ],
    ids=["none", "one empty", "empties", "one", "equal", "prefixes", "extreme ids", "one long", "chain"],
)
def test_corner_cases(prompts: list[list[int]]) -> None:
    check(prompts, order_prompts(*flatten(prompts)))


def test_equal_prompts_keep_their_row_order_among_many() -> None:
    random = np.random.default_rng(0)
    prompts = random.integers(0, 3, (3000, 4)).tolist()
    check(prompts, order_prompts(*flatten(prompts)))


def test_reads_a_memory_mapped_file_with_prompts_in_any_place(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    header = random.integers(0, 50, 90).tolist()
    prompts = [header[: random.integers(0, 90)] + random.integers(0, 50, 5).tolist() for _ in range(500)]
    flat, start, length = flatten(prompts)
    path = tmp_path / "tokens.int32"
    flat.tofile(path)
    shuffled = random.permutation(len(prompts))
    mapped = np.memmap(path, dtype=np.int32, mode="r")
    check([prompts[row] for row in shuffled], order_prompts(mapped, start[shuffled], length[shuffled]))


def test_prompts_may_share_their_place_in_the_file() -> None:
    flat = np.arange(10, dtype=np.int32)
    order = order_prompts(flat, np.array([0, 0, 5]), np.array([10, 4, 5], dtype=np.int32))
    assert order.permutation.tolist() == [1, 0, 2]
    assert order.lcp.tolist() == [0, 4, 0]


@settings(max_examples=300, deadline=None)
@given(families(), st.randoms(), st.sampled_from([1, 2, 4, 16]))
@example([[], []], Random(4), 4)
def test_longest_first_moves_only_what_shares_no_page(prompts: list[list[int]], random, page_size: int) -> None:
    flat, start, length = flatten(prompts)
    expected = np.array([random.choice([5, 100, 2000]) for _ in prompts], np.int32)
    walk = order_prompts(flat, start, length)
    moved = longest_first(walk, flat, start, length, expected, page_size)
    assert sorted(moved.permutation.tolist()) == list(range(len(prompts)))
    in_order = [prompts[row] for row in moved.permutation]
    assert moved.lcp.tolist() == [0] + [naive_lcp(left, right) for left, right in pairwise(in_order)]
    assert (moved.lcp // page_size).sum() == (walk.lcp // page_size).sum()
    if len(prompts) > 1:
        trunk = int(walk.lcp[1:].min())
        alone = np.append(True, moved.lcp[1:] < (trunk // page_size + 1) * page_size)
        blocks = np.maximum.reduceat(expected[moved.permutation], np.flatnonzero(alone))
        assert (blocks[1:] <= blocks[:-1]).all()


small_prompts = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


def measure_prompts(prompts: list[list[int]], num_samples: list[int]) -> Sharing:
    flat, start, length = flatten(prompts)
    order = order_prompts(flat, start, length)
    samples = np.array(num_samples, dtype=np.int64)
    return measure_sharing(length[order.permutation], order.lcp, samples[order.permutation])


@settings(max_examples=200, deadline=None)
@given(small_prompts, st.data())
def test_what_is_shared_equals_those_of_an_explicit_tree(prompts: list[list[int]], data: st.DataObject) -> None:
    num_samples = data.draw(st.lists(st.integers(1, 4), min_size=len(prompts), max_size=len(prompts)))
    sharing = measure_prompts(prompts, num_samples)
    nodes = {tuple(prompt[:stop]) for prompt in prompts for stop in range(1, len(prompt) + 1)}
    total = sum(len(prompt) * repeats for prompt, repeats in zip(prompts, num_samples, strict=True))
    assert (sharing.total_tokens, sharing.unique_tokens) == (total, len(nodes))
    assert sharing.saved_tokens == total - len(nodes)


def test_no_prompts_share_nothing() -> None:
    assert measure_prompts([], []) == Sharing(0, 0)
