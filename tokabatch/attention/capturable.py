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


@runtime_checkable
class Capturable(Protocol):
    """A paged cache that kernels outside the backend write and read."""

    @property
    def cache(self) -> PagedCache: ...

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        """Change the page table and pages as the step says, done once the outbox is sent: all that a step takes of
        `AttentionBackend.plan` where its attention is computed elsewhere."""
        ...
