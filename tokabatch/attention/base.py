"""The contract of an attention backend: it owns the paged KV cache and the page table, and computes attention over them.

A backend is called twice in a step or more: `plan` changes the page table and pages as the step requires and plans its passes;
`attend` is called once for each layer, writes the step's keys and values to the cache and computes attention. Backends depend
on the model only through `KVShape` and not on requests: they work with slots, positions and pages. `tests/attention` runs the
same checks on every backend. `capturable` is a second contract, for backends whose cache other kernels read and write.

The attention of a step is computed in passes, merged by log-sum-exp: for each run a causal pass over the slot's own pages, and
for each group of each `PrefixLevel` an unmasked pass over the pages that it shares (Hydragen, Juravsky et al. 2024,
arXiv:2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention.upload import Outbox
from tokabatch.scheduling.contracts import StepBatch


@dataclass(frozen=True, slots=True)
class KVShape:
    """The sizes of one replica's cache. `num_slots` and `max_pages` are the rows and columns of the page table; `page_size` is
    in tokens."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    num_slots: int
    max_pages: int

    def bytes_per_page(self, dtype: torch.dtype) -> int:
        """Return the bytes of one page, keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.page_size * dtype.itemsize


def token_slots(step: StepBatch) -> Int32:
    """Return the slot of each of the step's tokens, shape [T]."""
    return np.repeat(step.run_slot, step.run_length)


class AttentionBackend(Protocol):
    """Attention over a paged KV cache that it owns."""

    def plan(self, step: StepBatch, outbox: Outbox) -> None:
        """Change the page table and pages as the step requires and plan its passes. Both take effect when the outbox is
        sent."""
        ...

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
        """Return softmax(q k / sqrt(D)) v, shape [T, H, D], for the step that was planned last.

        Queries and keys have had their rotary embedding applied. Keys and values are written to the cache first; they are None
        if the decoder has written them there itself, which requires a `Capturable`.
        """
        ...
