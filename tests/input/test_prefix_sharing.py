"""The sharing counts against an explicit prefix tree."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.input.prefix_sharing import Sharing, measure_sharing
from tokabatch.input.prompt_order import order_prompts

prompt_lists = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


def measure(prompts: list[list[int]], num_samples: list[int]) -> Sharing:
    length = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    start = np.cumsum(length, dtype=np.int64) - length
    flat = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    order = order_prompts(flat, start, length)
    samples = np.array(num_samples, dtype=np.int64)
    return measure_sharing(length[order.permutation], order.lcp, samples[order.permutation])


@settings(max_examples=200, deadline=None)
@given(prompt_lists, st.data())
def test_counts_equal_those_of_an_explicit_tree(prompts: list[list[int]], data: st.DataObject) -> None:
    num_samples = data.draw(st.lists(st.integers(1, 4), min_size=len(prompts), max_size=len(prompts)))
    sharing = measure(prompts, num_samples)
    nodes = {tuple(prompt[:stop]) for prompt in prompts for stop in range(1, len(prompt) + 1)}
    total = sum(len(prompt) * repeats for prompt, repeats in zip(prompts, num_samples, strict=True))
    assert (sharing.total_tokens, sharing.unique_tokens) == (total, len(nodes))
    assert sharing.saved_tokens == total - len(nodes)


def test_no_prompts() -> None:
    assert measure([], []) == Sharing(0, 0)
