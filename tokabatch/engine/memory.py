"""The GPU memory left for the KV cache: measured by running the largest step once, not estimated.

The step is run through the decoder and the sampler without attention, whose outputs have the size of the queries and whose
workspace is a constant of the backend. Captured steps share a memory pool of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tokabatch.attention.capturable import PagedCache
from tokabatch.attention.tiles import ENOUGH_PLANES
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import JobError
from tokabatch.model.decoder import Decoder, KVPages
from tokabatch.model.sampling.sampler import sample
from tokabatch.model.sampling.slot_table import SlotTable
from tokabatch.number_text import counted

RESERVED_BYTES = 9 << 28
"""Bytes for attention's scratch, captured graphs, pinned copies of a few steps, and other libraries."""
PENALTY_BYTES = 1 << 30
"""Bytes of scratch for penalties (`model.sampling.penalties`)."""
CAPTURED_SHARE = 3 / 4
"""Tokens of a captured step beyond one for each running sample, as a share of the samples: prompts that replace finished
samples come in batches."""
LEAST_CAPTURED = 512
SLACK = 0.02
"""Share of the memory that the allocator may lose to fragments."""


def captured_tokens(sizes: ReplicaSizes) -> int:
    """Return the number of tokens of the largest step that is captured."""
    beside = max(LEAST_CAPTURED, int(sizes.max_running * CAPTURED_SHARE))
    return min(sizes.max_step_tokens, sizes.max_running + beside)


def fitting_pages(decoder: Decoder, sizes: ReplicaSizes, page_bytes: int, *, penalised: bool) -> int:
    """Return how many pages the device holds beside the loaded weights and the largest step. Raise JobError if that step does
    not fit. `penalised` is as in `Worker`."""
    device = decoder.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    tokens, samples = sizes.max_step_tokens, sizes.max_running
    try:
        needed = _peak(device, lambda: _layers(decoder, sizes, tokens))
        # Captured steps use a memory pool of their own, and further buffers that graphs read and write.
        needed += _peak(device, lambda: _layers(decoder, sizes, captured_tokens(sizes)))
        # Hidden states, queries, attention and its partial states.
        numbers = decoder.spec.hidden_size + (2 + ENOUGH_PLANES) * decoder.num_heads * decoder.spec.head_dim
        needed += captured_tokens(sizes) * (numbers * decoder.dtype.itemsize + ENOUGH_PLANES * decoder.num_heads * 4)
        draws = _peak(device, lambda: _draws(decoder, samples))
        # Penalised rows are drawn outside the captured steps' memory.
        needed += 2 * draws + PENALTY_BYTES if penalised else draws
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"a step of {counted(tokens, 'token')} and {counted(samples, 'sample')} does not fit the device beside the weights "
            f"({str(error).splitlines()[0]}); write a smaller engine.max_step_tokens and engine.max_running"
        ) from error
    free, total = torch.cuda.mem_get_info(device)
    if penalised:
        needed += 4 * samples * sizes.max_pages_per_sequence
        page_bytes += 4 * sizes.page_size
    return max(0, int(free - needed - RESERVED_BYTES - SLACK * total)) // page_bytes


def _peak(device: torch.device, work: Callable[[], object]) -> int:
    """Return the peak of device memory that `work` takes, in bytes."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def _layers(decoder: Decoder, sizes: ReplicaSizes, num_tokens: int) -> None:
    """Run `num_tokens` tokens through all layers, with every sample drawing."""
    device, spec = decoder.device, decoder.spec
    size = (len(decoder.layer_range), 1, decoder.num_kv_heads, sizes.page_size, spec.head_dim)
    k_LNKPD, v_LNKPD = (torch.zeros(size, dtype=decoder.dtype, device=device) for _ in range(2))
    cache = PagedCache(k_LNKPD, v_LNKPD, torch.zeros(1, 1, dtype=torch.int32, device=device))
    place_T = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    rows_S = torch.arange(sizes.max_running, device=device)
    decoder.hidden(place_T, place_T, lambda layer, q_THD, *_: torch.zeros_like(q_THD), rows_S, KVPages(cache, place_T))


def _draws(decoder: Decoder, num_rows: int) -> None:
    """Draw `num_rows` tokens at random, on the last pipeline stage only."""
    device = decoder.device
    if not decoder.mesh.is_last_stage:
        return
    logits_SV = decoder.logits(torch.zeros(num_rows, decoder.spec.hidden_size, dtype=decoder.dtype, device=device))
    slots, place_S = SlotTable(1, device), torch.zeros(num_rows, dtype=torch.int32, device=device)
    sample(logits_SV, slots.inputs(np.zeros(num_rows, np.int32), place_S, place_S), shard=decoder.vocabulary)
