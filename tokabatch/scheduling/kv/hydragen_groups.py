"""Which runs of a step share which prefix pages: nested Hydragen groups, computed for every step in vectorised passes.

The runs are in plan order, so those that share a prefix are neighbours and the pages shared by neighbours form an
LCP-interval tree. Each level of that tree within the `GroupingLimits` becomes one `PrefixLevel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.scheduling.contracts import PrefixLevel


@dataclass(frozen=True, slots=True)
class GroupingLimits:
    """The least number of runs, `min_group`, and of pages, `min_pages`, of a group in a prefix pass."""

    min_group: int
    min_pages: int


@dataclass(frozen=True, slots=True)
class PromptRuns:
    """Consecutive runs of one step that belong to one prompt, arrays over N such prompts in plan order.

    `shared_before` counts the physical pages shared with the previous prompt of these arrays (0 for the first),
    `shared_within` those shared by the prompt's own samples, `limit` the full pages that lie before all of its queries.
    """

    num_runs: Int32
    token_start: Int32
    token_stop: Int32
    slot: Int32
    shared_before: Int32
    shared_within: Int32
    limit: Int32


def find_groups(prompts: PromptRuns, limits: GroupingLimits) -> tuple[list[PrefixLevel], Int32]:
    """Return the levels from the root down, and the number of leading pages of each prompt that they cover, shape [N]."""
    count = len(prompts.num_runs)
    covered = np.zeros(count, np.int32)
    levels: list[PrefixLevel] = []
    if count == 0 or int(prompts.num_runs.sum()) < limits.min_group:
        return levels, covered
    between = np.zeros(count, np.int32)
    between[1:] = np.minimum(prompts.shared_before[1:], np.minimum(prompts.limit[1:], prompts.limit[:-1]))
    within = np.minimum(prompts.shared_within, prompts.limit)
    frozen = np.zeros(count, np.bool_)
    while True:
        starts = (between - covered < limits.min_pages) | frozen
        starts[0] = True
        alone = bool(starts.all())
        if alone:
            # Only samples of the same prompt share further pages: the last level.
            first, last, members, depth = np.arange(count), np.arange(count), prompts.num_runs, within
        else:
            bounds = np.append(np.flatnonzero(starts), count)
            first, last = bounds[:-1], bounds[1:] - 1
            inner = between.copy()
            inner[first] = np.where(first == last, within[first], np.iinfo(np.int32).max)
            depth = np.minimum.reduceat(inner, first)
            members = np.add.reduceat(prompts.num_runs, first)
        valid = (members >= limits.min_group) & (depth - covered[first] >= limits.min_pages) & ~frozen[first]
        if not valid.any():
            return levels, covered
        levels.append(
            PrefixLevel(
                token_start=prompts.token_start[first[valid]],
                token_stop=prompts.token_stop[last[valid]],
                slot=prompts.slot[first[valid]],
                page_start=covered[first[valid]],
                page_stop=depth[valid],
            )
        )
        if alone:
            return levels, np.where(valid, depth, covered)
        sizes = last - first + 1
        frozen |= ~np.repeat(valid, sizes)
        covered = np.where(frozen, covered, np.repeat(depth, sizes)).astype(np.int32)
