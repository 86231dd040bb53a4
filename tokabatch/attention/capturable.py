"""The second contract, beside `base`, of a backend whose cache other kernels read and write.

A step that is captured as a whole computes attention from the cache by its own kernels, and the decoder on a GPU rotates keys
and stores them in one kernel. Both access the cache directly, and captured steps change it without planning the backend's
passes.
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
    and the last row of the table belong to no sample: padding tokens of a batch are written there."""

    k_LNKPD: torch.Tensor
    v_LNKPD: torch.Tensor
    table: torch.Tensor

    @property
    def spare_slot(self) -> int:
        return self.table.shape[0] - 1


@dataclass(frozen=True, slots=True)
class PrefixKind:
    """A pass of all queries of a step over the first `pages` pages of one slot, split into `parts` along the keys."""

    pages: int
    parts: int


class PrefixPass(Protocol):
    """A planned pass for a fixed number of queries, which may be captured in a CUDA graph."""

    def begin(self, slot_1: torch.Tensor) -> None:
        """Read the page ids of this slot, int32 [1] on the device. Called once a step."""
        ...

    def attend(self, layer: int, q_THD: torch.Tensor, state_NTHD: torch.Tensor, lse_NTH: torch.Tensor) -> None:
        """Write the outputs of the N parts, [N, T, H, D], and their log-sum-exp, [N, T, H], base 2."""
        ...


@runtime_checkable
class Capturable(Protocol):
    """A backend whose paged cache other kernels read and write."""

    @property
    def cache(self) -> PagedCache: ...

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        """Change the page table and pages as the step requires, when the outbox is sent. It replaces `AttentionBackend.plan`
        for a step whose attention other kernels compute."""
        ...

    def prefix_kind(self, queries: int, pages: int) -> PrefixKind | None:
        """Return the pass for this many queries over at most this many shared pages, or None if tiles are as fast."""
        ...

    def prefix_pass(self, kind: PrefixKind, queries: int) -> PrefixPass:
        """Plan a pass of this kind for this many queries."""
        ...
