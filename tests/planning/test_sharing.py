"""The sharing counts against an explicit prefix tree."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.planning.order import order_prompts
from tokabatch.planning.sharing import Sharing, measure_sharing

prompt_lists = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


def measure(prompts: list[list[int]], num_samples: list[int], page_size: int) -> Sharing:
    length = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    start = np.cumsum(length, dtype=np.int64) - length
    flat = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    order = order_prompts(flat, start, length)
    samples = np.array(num_samples, dtype=np.int64)
    return measure_sharing(length[order.permutation], order.lcp, samples[order.permutation], page_size)


@settings(max_examples=200, deadline=None)
@given(prompt_lists, st.integers(1, 5), st.data())
def test_counts_equal_those_of_an_explicit_tree(prompts: list[list[int]], page_size: int, data: st.DataObject) -> None:
    num_samples = data.draw(st.lists(st.integers(1, 4), min_size=len(prompts), max_size=len(prompts)))
    sharing = measure(prompts, num_samples, page_size)

    nodes: set[tuple[int, ...]] = set()
    pages: set[tuple[int, ...]] = set()
    total = cached = 0
    for prompt, repeats in sorted(zip(prompts, num_samples, strict=True)):
        nodes |= {tuple(prompt[:stop]) for stop in range(1, len(prompt) + 1)}
        for _ in range(repeats):
            total += len(prompt)
            for stop in range(page_size, len(prompt) + 1, page_size):
                cached += page_size * (tuple(prompt[:stop]) in pages and stop < len(prompt))
                pages.add(tuple(prompt[:stop]))
    assert sharing.total_tokens == total
    assert sharing.unique_tokens == len(nodes)
    assert sharing.saved_tokens == total - len(nodes)
    assert sharing.cacheable_tokens == cached


def test_a_page_of_one_token_saves_all_but_the_last_tokens() -> None:
    sharing = measure([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 1], 1)
    assert (sharing.total_tokens, sharing.unique_tokens, sharing.cacheable_tokens) == (16, 4, 9)


def test_no_prompts() -> None:
    sharing = measure([], [], 16)
    assert sharing == Sharing(0, 0, 0)
