"""The contract of an attention backend: it owns the paged KV cache and the page table, and computes attention over both.

A step takes three calls. `prepare` puts what the device must be told into the step's outbox; once that is sent, `plan` applies
the step's page-table cells and page copies and plans the passes; `attend` runs once a layer: it writes the step's keys and
values, unless the decoder has done so, then attends. Backends know nothing of models beyond `KVShape`, and nothing of requests:
slots, positions and pages are all they see. `tests/attention` runs every backend through the same checks.

A step's result is a list of passes merged by log-sum-exp: one causal pass a run over the slot's own pages, and for each
`PrefixLevel` one unmasked pass a group over the pages it shares (Hydragen, Juravsky et al. 2024, arXiv:2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokabatch.arrays import Int32, Int64
from tokabatch.attention.upload import Outbox
from tokabatch.scheduling.contracts import StepBatch


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of one replica's cache. `num_slots` and `max_pages` size the page table."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    num_slots: int
    max_pages: int

    def bytes_per_page(self, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.page_size * dtype.itemsize


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


def token_slots(step: StepBatch) -> Int32:
    """The slot of each of the step's tokens, shape [T]."""
    return np.repeat(step.run_slot, step.run_length)


def cache_places(step: StepBatch, page_table: Int32, page_size: int) -> Int64:
    """Where the keys and values of each of the step's tokens go, shape [T]: page * page_size + offset."""
    position_T = step.positions()
    page_T = page_table[token_slots(step), position_T // page_size]
    return page_T.astype(np.int64) * page_size + position_T % page_size


class AttentionBackend(Protocol):
    """What the engine calls."""

    @property
    def cache(self) -> PagedCache | None:
        """The cache, where a fused kernel may write a step's keys and values itself; None where `attend` alone writes."""
        ...

    def prepare_changes(self, step: StepBatch, outbox: Outbox) -> None:
        """For a step whose attention is computed elsewhere: put its cache changes alone into the outbox. Only where there is a
        `cache`."""
        ...

    def apply_changes(self) -> None:
        """Apply what was prepared, once the outbox is sent."""
        ...

    def prepare(self, step: StepBatch, outbox: Outbox) -> None:
        """Put the step's cache changes and page lists into the outbox."""
        ...

    def plan(self, slot_T: torch.Tensor, position_T: torch.Tensor) -> None:
        """Apply the cache changes and plan the passes of the step just prepared. The slot and position of each of its tokens,
        int32 on the device, are read until the step's last `attend`."""
        ...

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor | None,
        v_TKD: torch.Tensor | None,
        out_THD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v of shape [T, H, D], in `out_THD` where that is given. Queries and keys carry their
        positions. Keys and values are written first; None where they are in the cache already."""
        ...


def prepare_alone(backend: AttentionBackend, step: StepBatch, device: torch.device) -> None:
    """`prepare` and `plan` with an outbox of their own."""
    outbox = Outbox(device)
    backend.prepare(step, outbox)
    slot, position = outbox.add(token_slots(step)), outbox.add(step.positions().astype(np.int32))
    outbox.send()
    backend.plan(slot.tensor, position.tensor)
