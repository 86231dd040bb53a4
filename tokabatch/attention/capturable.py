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


@runtime_checkable
class Capturable(Protocol):
    """A backend whose paged cache other kernels read and write."""

    @property
    def cache(self) -> PagedCache: ...

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        """Change the page table and pages as the step requires, when the outbox is sent. It replaces `AttentionBackend.plan`
        for a step whose attention other kernels compute."""
        ...
