"""The plan order: prompts sorted by their token ids, each with the length it shares with its predecessor.

Sorting token sequences lexicographically is the depth-first walk of their prefix tree, and the longest common prefix of two
neighbours is the depth of the node where they part, so permutation and LCPs describe the whole tree.

The sort is a most-significant-digit radix sort over arrays (Kärkkäinen and Rantala, "Engineering radix sort for strings", 2008)
with the tokens as digits. A group is a run of prompts that agree on their first `depth` tokens. A round moves every group past
what all its members share and splits it by the next token; a split fixes the LCPs between the parts. Only the tokens that
distinguish prompts are read, in place, and at most a block of them is copied at a time: memory besides the token file is about
100 bytes per prompt, whatever the prompts' length.

Shape legend: R prompts, M members of unfinished groups, G groups, W tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64

_FIRST_BLOCK = 4
_LARGEST_BLOCK = 4096
_BLOCK_TOKENS = 1 << 21
"""Tokens compared at once: bounds the working memory (about 20 bytes each)."""
_ENDED = -1


@dataclass(frozen=True, slots=True)
class Order:
    """`permutation[i]` is the i-th prompt of the order; `lcp[i]` counts the leading tokens it shares with the one before it,
    and `lcp[0]` is 0."""

    permutation: Int64
    lcp: Int32

    def __len__(self) -> int:
        return len(self.permutation)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Prompt tokens of a run, over all samples."""

    total_tokens: int
    """Computed without any sharing: the sum of n x length."""
    unique_tokens: int
    """Nodes of the prefix tree: the least that any order can compute."""

    @property
    def saved_tokens(self) -> int:
        """The theoretical maximum that sharing can save."""
        return self.total_tokens - self.unique_tokens


@dataclass(frozen=True, slots=True)
class _Groups:
    """The prompts whose order is still open. Groups lie one after another on the member axis."""

    slot_M: Int64
    """The place of each member in the order; the places of a group are consecutive and belong to it alone."""
    first_G: Int64
    """Where each group begins on the member axis."""
    depth_G: Int64
    """Leading tokens on which all members of the group agree."""

    def sizes(self) -> Int64:
        return np.diff(self.first_G, append=len(self.slot_M))

    def select(self, keep_G: Bool) -> _Groups:
        """Return only the chosen groups."""
        sizes_G = self.sizes()
        keep_M = np.repeat(keep_G, sizes_G)
        kept_sizes_G = sizes_G[keep_G]
        return _Groups(self.slot_M[keep_M], np.cumsum(kept_sizes_G) - kept_sizes_G, self.depth_G[keep_G])


def order_prompts(tokens: Int32, start: Int64, length: Int32) -> Order:
    """Sort R prompts by their token ids, a prefix before what extends it and equal prompts by their index.

    Prompt r is `tokens[start[r] : start[r] + length[r]]`; `tokens` (flat, ids >= 0) may be memory-mapped and is only read.
    `start` and `length` have shape [R]. Time is linear in the tokens that distinguish prompts, times log R.
    """
    flat = _readable(tokens)
    num_prompts = len(start)
    permutation = np.arange(num_prompts, dtype=np.int64)
    lcp = np.zeros(num_prompts, dtype=np.int32)
    groups = _Groups(permutation.copy(), np.zeros(min(num_prompts, 1), dtype=np.int64), np.zeros(1, dtype=np.int64))
    while len(groups.slot_M):
        groups = _Groups(groups.slot_M, groups.first_G, _shared_depth(flat, start, length, permutation, groups))
        groups = _split(flat, start, length, permutation, lcp, groups)
    return Order(permutation, lcp)


def longest_first(order: Order, tokens: Int32, start: Int64, length: Int32, expected: Int32, page_size: int) -> Order:
    """Move the prompts that are expected to run longest to the front, so that none of them runs alone at the end.

    `tokens`, `start` and `length` are those that were ordered; `expected[r]` is how long the samples of prompt r may get.
    Prompts that share a page beyond the header common to all stay together in their order: no full page is shared less.
    """
    if len(order) < 2:
        return order
    trunk = int(order.lcp[1:].min())
    begins = order.lcp < (trunk // page_size + 1) * page_size
    begins[0] = True
    first = np.flatnonzero(begins)
    longest = np.maximum.reduceat(expected[order.permutation], first)
    if (longest[1:] <= longest[:-1]).all():
        return order
    blocks = np.argsort(-longest, kind="stable")
    sizes = np.diff(first, append=len(order))[blocks]
    into = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.repeat(first[blocks], sizes) + into
    permutation, lcp = order.permutation[place], order.lcp[place]
    # After the header, less than a page is shared at the new seams.
    left = length[permutation] - trunk
    shared = _agreement(_readable(tokens), start[permutation] + trunk, left, page_size)
    seams = (np.cumsum(sizes) - sizes)[1:]
    lcp[seams] = trunk + np.minimum(shared[seams], np.minimum(left[seams], left[seams - 1]))
    lcp[0] = 0
    return Order(permutation, lcp)


def measure_sharing(length: Int32, lcp: Int32, num_samples: Int64) -> Sharing:
    """Count what R prompts share; `length`, `lcp` and `num_samples` have shape [R], in plan order.

    In that order the LCP with the predecessor is the longest with any earlier prompt, so a row's own part is its length minus
    its LCP. Every row has at least one sample.
    """
    length_R = length.astype(np.int64)
    lcp_R = lcp.astype(np.int64)
    return Sharing(
        total_tokens=int((num_samples * length_R).sum()),
        unique_tokens=int((length_R - lcp_R).sum()),
    )


def _readable(tokens: Int32) -> Int32:
    """Return the tokens as an array that can be indexed; with a single 0 if there are none."""
    return np.asarray(tokens) if len(tokens) else np.zeros(1, dtype=np.int32)


def _split(flat: Int32, start: Int64, length: Int32, permutation: Int64, lcp: Int32, groups: _Groups) -> _Groups:
    """Sort each group's members by their next token, in `permutation`; write the LCPs that this decides into `lcp`.

    Returns the parts that still have more than one member. Members that end here precede the others and are finished.
    """
    row_M = permutation[groups.slot_M]
    group_M = np.repeat(np.arange(len(groups.first_G)), groups.sizes())
    depth_M = groups.depth_G[group_M]
    next_M = np.full(len(row_M), _ENDED, dtype=np.int64)
    alive_M = length[row_M] > depth_M
    next_M[alive_M] = flat[(start[row_M] + depth_M)[alive_M]]
    key_M = (group_M << 32) + 1 + next_M
    by_key_M = np.argsort(key_M, kind="stable")
    key_M = key_M[by_key_M]
    permutation[groups.slot_M] = row_M[by_key_M]

    begins_M = np.empty(len(key_M), dtype=np.bool_)
    begins_M[0] = True
    np.not_equal(key_M[1:], key_M[:-1], out=begins_M[1:])
    ended_M = (key_M & 0xFFFFFFFF) == 0
    decided_M = begins_M | ended_M
    decided_M[groups.first_G] = False
    lcp[groups.slot_M[decided_M]] = depth_M[decided_M]

    first_P = np.flatnonzero(begins_M)
    parts = _Groups(groups.slot_M, first_P, depth_M[first_P] + 1)
    return parts.select((parts.sizes() > 1) & ~ended_M[first_P])


def _shared_depth(flat: Int32, start: Int64, length: Int32, permutation: Int64, groups: _Groups) -> Int64:
    """Return how many leading tokens all members of each group share, shape [G], never past the end of a member.

    Block sizes double while a group still agrees, so that a long shared header takes few passes and an early split few tokens.
    """
    depth_G = groups.depth_G.copy()
    open_G = np.arange(len(depth_G))
    width = _FIRST_BLOCK
    while len(open_G):
        row_M = permutation[groups.slot_M]
        depth_M = np.repeat(depth_G[open_G], groups.sizes())
        agree_M = _agreement(flat, start[row_M] + depth_M, length[row_M] - depth_M, width)
        agree_M[groups.first_G] = width
        agree_G = np.minimum.reduceat(agree_M, groups.first_G)
        left_G = length[row_M[groups.first_G]] - depth_G[open_G]
        depth_G[open_G] += np.minimum(agree_G, left_G)
        more_G = (agree_G == width) & (left_G > width)
        groups = groups.select(more_G)
        open_G = open_G[more_G]
        width = min(2 * width, _LARGEST_BLOCK)
    return depth_G


def _agreement(flat: Int32, position_M: Int64, left_M: Int64 | Int32, width: int) -> Int64:
    """Return how many of the next `width` tokens each member shares with the member before it, shape [M]; the end of a prompt
    counts as a token different from any other. Neighbours suffice: the minimum over a group is what all of it shares."""
    num_members = len(position_M)
    agree_M = np.zeros(num_members, dtype=np.int64)
    step = max(_BLOCK_TOKENS // width, 2)
    offset_W = np.arange(width)
    for begin in range(0, num_members - 1, step):
        stop = min(begin + step + 1, num_members)
        block_MW = flat.take(position_M[begin:stop, None] + offset_W, mode="clip")
        left_chunk_M = left_M[begin:stop]
        if left_chunk_M.min() < width:
            block_MW[offset_W >= left_chunk_M[:, None]] = _ENDED
        differs_MW = block_MW[1:] != block_MW[:-1]
        first_M = differs_MW.argmax(axis=1)
        first_M[~differs_MW[np.arange(len(first_M)), first_M]] = width
        agree_M[begin + 1 : stop] = first_M
    return agree_M
