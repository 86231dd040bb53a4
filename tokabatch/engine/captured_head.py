"""The head of a captured step, from hidden states to drawn tokens, as CUDA graphs (see `captured`).

Shape legend: T tokens, S sampled rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.engine.graphs import GraphRecorder, Ladder, aligned, worth_capturing
from tokabatch.model.decoder import Decoder
from tokabatch.model.sampling.sampler import sample
from tokabatch.model.sampling.slot_table import SamplerInputs, SlotTable


@dataclass(frozen=True, slots=True)
class HeadKind:
    """The fields of `SamplerInputs` that determine which kernels are launched."""

    any_random: bool
    any_filter: bool
    max_logprobs: int


@dataclass(frozen=True, slots=True)
class HeadStep:
    """The head of a step: the size and kind of its graph, and the words that the graph reads."""

    size: int
    kind: HeadKind
    words: Int32


class HeadGraphs:
    """Graphs that draw tokens from at most `most` rows of `hidden_TE`."""

    def __init__(
        self,
        decoder: Decoder,
        hidden_TE: torch.Tensor,
        last_token: torch.Tensor,
        slots: SlotTable,
        most: int,
        recorder: GraphRecorder,
    ) -> None:
        self._decoder = decoder
        self._hidden_TE = hidden_TE
        self._last_token = last_token
        self._slots = slots
        self._recorder = recorder
        self._words = torch.zeros(3 * aligned(most), dtype=torch.int32, device=decoder.device)
        worth = worth_capturing(decoder.spec.hidden_size * decoder.vocabulary.width)
        self._ladder: Ladder[HeadKind, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = Ladder(most, self._capture, worth)

    def prepare(self, kind: HeadKind) -> None:
        """Compile all kernels and capture the coarse sizes."""
        self._words.zero_()
        self._recorder.trial(lambda: self._compute(1, kind))
        self._ladder.prepare(kind)

    def fit(self, rows: Int32, slots: Int32, positions: Int32) -> HeadStep:
        """Return the head for a step that draws from the hidden states in `rows`, at least one; all three have shape [S]."""
        kind = HeadKind(*self._slots.kinds(slots))
        size = self._ladder.size(len(rows), kind)
        columns = np.zeros((3, aligned(size)), np.int32)
        columns[1] = len(self._last_token) - 1
        columns[:, : len(rows)] = rows, slots, positions
        return HeadStep(size, kind, columns.reshape(-1))

    def make_ahead(self) -> bool:
        """See `Ladder`."""
        return self._ladder.make_ahead()

    def run(self, step: HeadStep, words: torch.Tensor) -> torch.Tensor:
        """Launch the head and return the draws in the layout of `Sampled.packed`, for the whole captured size. They are valid
        until the next head of that size and kind is launched."""
        self._words[: len(words)].copy_(words)
        graph, packed = self._ladder.at(step.size, step.kind)
        graph.replay()
        return packed

    def _capture(self, size: int, kind: HeadKind) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        return self._recorder.capture(lambda: self._compute(size, kind))

    def _compute(self, size: int, kind: HeadKind) -> torch.Tensor:
        row_S, slot_S, position_S = self._words.narrow(0, 0, 3 * aligned(size)).view(3, -1)[:, :size]
        logits_SV = self._decoder.logits(self._hidden_TE.index_select(0, row_S))
        inputs = SamplerInputs(self._slots, slot_S, position_S, kind.any_random, kind.any_filter, kind.max_logprobs)
        return sample(logits_SV, inputs, self._last_token, shard=self._decoder.vocabulary).packed
