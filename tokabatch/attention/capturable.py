"""What only a backend whose cache other kernels use must offer, beside the contract in `base`.

A step captured whole computes attention from the cache itself, and a decoder on a GPU rotates and stores keys in one kernel:
both need the cache, and captured steps need its changes without a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from tokabatch.attention.upload import Outbox
from tokabatch.scheduling.contracts import StepBatch


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Keys and values, each [layers, pages, K, P, D], and the page table [slots, columns], int32, on the device. The last page
    and the table's last row belong to no sample: tokens that only fill up a batch are written there."""

    k_LNKPD: torch.Tensor
    v_LNKPD: torch.Tensor
    table: torch.Tensor

    @property
    def spare_slot(self) -> int:
        return self.table.shape[0] - 1


@dataclass(frozen=True, slots=True)
class PrefixKind:
    """A pass of all queries of a step over the first `pages` of one slot, in so many `parts` along its keys."""

    pages: int
    parts: int


class PrefixPass(Protocol):
    """A planned pass for a fixed number of queries, which a graph may contain."""

    def begin(self, slot_1: torch.Tensor) -> None:
        """Read the page ids of this slot, int32 [1] on the device; once a step."""
        ...

    def attend(self, layer: int, q_THD: torch.Tensor, state_NTHD: torch.Tensor, lse_NTH: torch.Tensor) -> None:
        """Write the outputs of the parts, [N, T, H, D], and their log-sum-exp, [N, T, H], base 2."""
        ...


@runtime_checkable
class Capturable(Protocol):
    """A paged cache that kernels outside the backend write and read."""

    @property
    def cache(self) -> PagedCache: ...

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        """Change the page table and pages as the step says, done once the outbox is sent: all that a step takes of
        `AttentionBackend.plan` where its attention is computed elsewhere."""
        ...

    def prefix_kind(self, queries: int, pages: int) -> PrefixKind | None:
        """The pass for so many queries over at most so many pages that all of them share; None where tiles are as fast."""
        ...

    def prefix_pass(self, kind: PrefixKind, queries: int) -> PrefixPass:
        """Plan such a pass for so many queries."""
        ...
