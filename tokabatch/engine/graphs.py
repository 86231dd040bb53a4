"""CUDA graphs for small decode steps, where launching a layer's kernels takes the host longer than the GPU runs them.

A step's kernels between two calls of attention depend on nothing but its number of tokens, so those pieces are captured, for a
ladder of sizes, and a step is filled up to the next one with tokens of the spare slot. Attention runs between the pieces as
planned for the step. The smallest sizes are captured whole, too, for steps whose attention needs no plan. What follows the
last layer is launched as ever, so that no logits are kept per size.

Shape legend: T tokens, H query heads, D head dimension, L layers, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokabatch.attention.base import AttentionBackend
from tokabatch.messages import Int32, StepBatch
from tokabatch.model.decoder import Decoder, KVPages, Places

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, *range(640, 2049, 128))
"""Captured, and the running limit itself beside them: above the largest the GPU needs longer than the host does to launch."""
WHOLE = 512
"""Sizes up to this one are captured whole, too."""


@dataclass(frozen=True, slots=True)
class _Captured:
    """One size. All pieces but the last end in a layer's queries, the last in the hidden state behind the last layer, as does
    the whole."""

    pieces: tuple[torch.cuda.CUDAGraph, ...]
    hidden_TE: torch.Tensor
    whole: torch.cuda.CUDAGraph | None
    whole_hidden_TE: torch.Tensor


class DecodeGraphs:
    """Captured when the engine starts, on the stream that steps run on. A size's steps run one after another."""

    def __init__(
        self,
        decoder: Decoder,
        backend: AttentionBackend,
        last_token: torch.Tensor,
        limit: int,
        sizes: Sequence[int] = SIZES,
    ) -> None:
        cache = backend.cache
        assert cache is not None, "the decoder must write the cache"
        wanted = [*(size for size in sizes if size < limit), limit]
        self._sizes = np.array(wanted)
        self._decoder = decoder
        self._backend = backend
        self._cache = cache
        self._last_token = last_token
        largest, device = max(wanted), decoder.device
        self._places_2T = torch.zeros(2, largest, dtype=torch.int32, device=device)
        self._places_2T[0] = cache.spare_slot
        heads = (largest, decoder.num_heads, decoder.spec.head_dim)
        self._mixed_THD = torch.zeros(heads, dtype=decoder.dtype, device=device)
        self._queries_THD = torch.zeros_like(self._mixed_THD)
        pool = torch.cuda.graph_pool_handle()
        self._captured = {size: self._capture(size, pool) for size in sorted(wanted, reverse=True)}

    def size_for(self, step: StepBatch) -> int | None:
        """The captured size that a step runs at; None where it is too large, or brings tokens from the host."""
        if step.num_prefill_runs:
            return None
        place = int(np.searchsorted(self._sizes, len(step.run_slot)))
        return int(self._sizes[place]) if place < len(self._sizes) else None

    def padded(self, slot_T: Int32, position_T: Int32, size: int) -> Int32:
        """Slots and positions filled up to `size` by the spare slot, [2, size]."""
        places = np.zeros((2, size), np.int32)
        places[0] = self._cache.spare_slot
        places[:, : len(slot_T)] = slot_T, position_T
        return places

    def stage(self, places_2T: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a step's `padded` places where its graphs read them; the slots and positions of its own tokens."""
        size = places_2T.shape[1]
        self._places_2T[:, :size].copy_(places_2T)
        return self._places_2T[0, :num_tokens], self._places_2T[1, :num_tokens]

    def run(self, size: int, num_tokens: int) -> torch.Tensor:
        """hidden_TE behind the last layer, of the step that was staged and planned."""
        captured = self._captured[size]
        if captured.whole is not None and self._backend.needs_no_plan:
            captured.whole.replay()
            return captured.whole_hidden_TE[:num_tokens]
        queries_THD, mixed_THD = self._queries_THD[:num_tokens], self._mixed_THD[:num_tokens]
        for layer, piece in enumerate(captured.pieces[:-1]):
            piece.replay()
            self._backend.attend(layer, queries_THD, None, None, mixed_THD)
        captured.pieces[-1].replay()
        return captured.hidden_TE[:num_tokens]

    def _capture(self, size: int, pool: Any) -> _Captured:
        slot_T, position_T = self._places_2T[:, :size]
        cache = self._cache
        pages = KVPages(cache.k_LNKPD, cache.v_LNKPD, cache.table, slot_T, self._queries_THD[:size])
        places = self._decoder.places(position_T, pages)
        num_layers = len(self._decoder.layer_range)
        hidden_TE = None
        for layer in (0, num_layers):
            # Once as it is: libraries choose and load their kernels at the first call with a shape.
            hidden_TE = self._piece(layer, hidden_TE, places)
        self._attend_unplanned(0, size)
        pieces: list[torch.cuda.CUDAGraph] = []
        for layer in range(num_layers + 1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden_TE = self._piece(layer, hidden_TE, places)
            pieces.append(graph)
        assert hidden_TE is not None
        if size > WHOLE:
            return _Captured(tuple(pieces), hidden_TE, None, hidden_TE)
        whole, whole_hidden_TE = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(whole, pool=pool):
            for layer in range(num_layers + 1):
                if layer:
                    self._attend_unplanned(layer - 1, size)
                whole_hidden_TE = self._piece(layer, whole_hidden_TE, places)
        assert whole_hidden_TE is not None
        return _Captured(tuple(pieces), hidden_TE, whole, whole_hidden_TE)

    def _attend_unplanned(self, layer: int, size: int) -> None:
        slot_T, position_T = self._places_2T[:, :size]
        self._backend.attend_unplanned(layer, self._queries_THD[:size], slot_T, position_T, self._mixed_THD[:size])

    def _piece(self, layer: int, hidden_TE: torch.Tensor | None, places: Places) -> torch.Tensor:
        """From the attention of the layer before to this layer's queries."""
        decoder, size = self._decoder, places.positions_T.shape[0]
        if layer == 0:
            slot_T = self._places_2T[0, :size]
            hidden_TE = decoder.embed(self._last_token.index_select(0, slot_T))
        else:
            assert hidden_TE is not None
            hidden_TE = decoder.leave(layer - 1, hidden_TE, self._mixed_THD[:size])
        if layer < len(decoder.layer_range):
            decoder.enter(layer, hidden_TE, places)
        return hidden_TE
