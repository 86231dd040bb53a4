"""The contract of an attention backend: it owns the paged KV cache and the page table, and computes attention over both.

Two calls a step. `prepare` applies the step's page-table cells and page copies and plans the passes; `attend` runs once a
layer: it writes the step's keys and values, then attends. Backends know nothing of models beyond `KVShape`, and nothing of
requests: slots, positions and pages are all they see. `tests/attention` runs every backend through the same checks.

A step's result is a list of passes merged by log-sum-exp: one causal pass a run over the slot's own pages, and for each
`PrefixLevel` one unmasked pass a group over the pages it shares (Hydragen, Juravsky et al. 2024, arXiv:2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokabatch.messages import Int32, Int64, StepBatch


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


def cache_places(step: StepBatch, page_table: Int32, page_size: int) -> Int64:
    """Where the keys and values of each of the step's tokens go, shape [T]: page * page_size + offset."""
    position_T = step.positions()
    page_T = page_table[np.repeat(step.run_slot, step.run_length), position_T // page_size]
    return page_T.astype(np.int64) * page_size + position_T % page_size


class AttentionBackend(Protocol):
    """What the engine calls."""

    def prepare(self, step: StepBatch) -> None:
        """Apply the step's cache changes and plan its passes."""
        ...

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Write keys and values, return softmax(q k / sqrt(D)) v of shape [T, H, D]. Queries and keys carry their positions."""
        ...
