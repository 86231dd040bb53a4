"""What sharing prefixes can save in prefill, counted before the first step.

The bound is the prefix tree's, over prompts in plan order (see `planning.order`) that are each sampled n times: every node of
the tree is computed once for the whole run.

This module does not know which prompts run at the same time or how much memory there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int32, Int64


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


def measure_sharing(length: Int32, lcp: Int32, num_samples: Int64) -> Sharing:
    """Count what R prompts share; `length`, `lcp` and `num_samples` have shape [R], in plan order.

    In that order the LCP with the predecessor is the longest with any earlier prompt, so a row's own part is its length
    less its LCP. Every row has at least one sample.
    """
    length_R = length.astype(np.int64)
    lcp_R = lcp.astype(np.int64)
    return Sharing(
        total_tokens=int((num_samples * length_R).sum()),
        unique_tokens=int((length_R - lcp_R).sum()),
    )
