"""What a GPU has left for the KV cache: measured by running the largest step once, not estimated.

The step runs on the decoder and the sampler with attention left out: its outputs have the queries' size, and its own scratch is
a constant of the backend's.
"""

from __future__ import annotations

import numpy as np
import torch

from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.errors import JobError
from tokabatch.model.decoder import Decoder, KVPages
from tokabatch.model.sampler import sample
from tokabatch.model.slot_table import SlotTable

RESERVED_BYTES = 2 << 30
"""Attention's scratch, captured graphs, the pinned copies of a few steps, and what other libraries take."""
SLACK = 0.02
"""Share of the memory that the allocator may lose to fragments."""


def fitting_pages(decoder: Decoder, sizes: ReplicaSizes, page_bytes: int) -> int:
    """Pages that the device holds beside the weights, which are loaded, and a largest step. Raises JobError where it does not
    even hold that step."""
    device = decoder.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        _largest_step(decoder, sizes)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"a step of {sizes.max_step_tokens:,} tokens and {sizes.max_running:,} samples does not fit the device beside the "
            f"weights ({str(error).splitlines()[0]}); write a smaller engine.max_step_tokens and engine.max_running"
        ) from error
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - peak - RESERVED_BYTES - SLACK * total)) // page_bytes


def _largest_step(decoder: Decoder, sizes: ReplicaSizes) -> None:
    """As many tokens as a step may have, all samples drawing, the random way."""
    device, spec = decoder.device, decoder.spec
    num_tokens, num_rows = sizes.max_step_tokens, sizes.max_running
    cache = (len(decoder.layer_range), 1, decoder.num_kv_heads, sizes.page_size, spec.head_dim)
    k_LNKPD, v_LNKPD = (torch.zeros(cache, dtype=decoder.dtype, device=device) for _ in range(2))
    place_T = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    pages = KVPages(k_LNKPD, v_LNKPD, torch.zeros(1, 1, dtype=torch.int32, device=device), place_T)
    rows_S = torch.arange(num_rows, device=device)
    logits_SV = decoder.forward(place_T, place_T, _no_attention, rows_S, pages)
    slots = SlotTable(1, device)
    sample(logits_SV, slots.inputs(np.zeros(num_rows, np.int32), place_T[:num_rows], place_T[:num_rows]))


def _no_attention(layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros_like(q_THD)
