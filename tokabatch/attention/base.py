"""The contract of an attention backend: it owns the paged KV cache and the page table, and computes attention over both.

A step takes two calls. `plan` makes the step's changes to page table and pages and plans its passes; `attend` runs once a
layer: it writes the step's keys and values, then attends. Backends are independent of models beyond `KVShape`, and of requests:
slots, positions and pages are all they see. `tests/attention` runs every backend through the same checks. `capturable` is the
second contract, of a backend whose cache other kernels write and read.

A step's result is a list of passes merged by log-sum-exp: one causal pass a run over the slot's own pages, and for each
`PrefixLevel` one unmasked pass a group over the pages it shares (Hydragen, Juravsky et al. 2024, arXiv:2402.05099).
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


def token_slots(step: StepBatch) -> Int32:
    """The slot of each of the step's tokens, shape [T]."""
    return np.repeat(step.run_slot, step.run_length)


class AttentionBackend(Protocol):
    """What every backend does."""

    def plan(self, step: StepBatch, outbox: Outbox) -> None:
        """Change the page table and pages as the step says and plan its passes, all of it done once the outbox is sent."""
        ...

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v of shape [T, H, D] for the step planned last. Queries and keys are rotated already. Keys and
        values are written first; None where the decoder has written them to the cache of a `Capturable`."""
        ...
