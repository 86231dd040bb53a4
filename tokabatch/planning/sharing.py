"""What sharing prefixes can save in prefill, counted before the first step.

Two bounds, both over prompts in plan order (see `planning.order`) that are each sampled n times. The prefix tree's is
the theoretical one: every node of the tree is computed once for the whole run. The paged one is what a cache of full
pages can give when prompts run in plan order: only whole pages are shared, and the last token of every prompt is
computed for each sample, because its logits are needed.

This module does not know which prompts run at the same time or how much memory there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.messages import Int32, Int64


@dataclass(frozen=True, slots=True)
class Sharing:
    """Prompt tokens of a run, over all samples."""

    total_tokens: int
    """Computed without any sharing: the sum of n x length."""
    unique_tokens: int
    """Nodes of the prefix tree: the least that any order can compute."""
    cacheable_tokens: int
    """Of the total, those that a cache of full pages can serve."""

    @property
    def saved_tokens(self) -> int:
        """The theoretical maximum that sharing can save."""
        return self.total_tokens - self.unique_tokens


def measure_sharing(length: Int32, lcp: Int32, num_samples: Int64, page_size: int) -> Sharing:
    """Count what R prompts share; `length`, `lcp` and `num_samples` have shape [R], in plan order.

    In that order the LCP with the predecessor is the longest with any earlier prompt, so a row's own part is its length
    less its LCP. Every row has at least one sample.
    """
    length_R = length.astype(np.int64)
    lcp_R = lcp.astype(np.int64)
    last_R = np.maximum(length_R - 1, 0)
    first_sample_R = _whole_pages(np.minimum(lcp_R, last_R), page_size)
    other_samples_R = (num_samples - 1) * _whole_pages(last_R, page_size)
    return Sharing(
        total_tokens=int((num_samples * length_R).sum()),
        unique_tokens=int((length_R - lcp_R).sum()),
        cacheable_tokens=int((first_sample_R + other_samples_R).sum()),
    )


def _whole_pages(num_tokens_R: Int64, page_size: int) -> Int64:
    return num_tokens_R // page_size * page_size
