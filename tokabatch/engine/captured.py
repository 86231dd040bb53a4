"""Steps as two CUDA graphs, the body and the head, each launched at once regardless of the number of layers.

The body computes hidden states from tokens: the embedding and all layers, attention included. Its launches depend only on the
number of tokens (`attention.tiles`), so that any step that is not too large can use it, with prefill or without. The head
computes the drawn tokens from hidden states: the logits and the sampler, which also stores each token where the body of the
next step reads it. A step is padded to a captured size with tokens of the spare slot. Graphs read a step from fixed buffers,
each written by one copy before the replay.

A pipeline stage has graphs for its own part: only the first stage has the embedding, only the last the head. Communication
between stages is not captured: a body reads from and writes to a buffer, which is received before the replay and sent after it.
Each stage therefore chooses its graphs independently; one may launch a step kernel by kernel while another replays a graph.

Imports triton: only a worker on a GPU loads this module. Shape legend: T tokens, S sampled rows, H query heads, D head
dimension, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention.base import token_slots
from tokabatch.attention.capturable import Capturable
from tokabatch.attention.tiles import ENOUGH_PLANES, MAX_PLANES, WORDS, TilePlan, plan_tiles
from tokabatch.attention.triton_decode import decode_and_merge
from tokabatch.attention.triton_tiles import Planes, attend_tiles, hopper_tiles, tile_shape
from tokabatch.engine.captured_head import HeadGraphs, HeadKind
from tokabatch.engine.graphs import FINEST, GraphRecorder, Ladder, aligned, worth_capturing
from tokabatch.model.decoder import Decoder, KVPages
from tokabatch.model.sampling.slot_table import SlotTable
from tokabatch.scheduling.contracts import StepBatch

TILES_A_TOKEN, LEAST_TILES = 2, 8192
"""The most tiles of a captured step: so many for each token, and so many more."""
HEADER = 4
"""Words before the columns of tokens: the number of wide and of narrow tiles, and the offset of each list."""
LONG_PROMPT, MOSTLY = 512, 4096
"""Prompt tokens of each run, on average, and of a step in total from which it is launched kernel by kernel: it takes longer
than its launches, and specialised kernels are faster for long prompts."""


@dataclass(frozen=True, slots=True)
class BodyStep:
    """The body of a step: the size and kind of its graph (whether it has tiles), the words that the graph reads, and how many
    of the `size` tokens belong to the step."""

    size: int
    kind: bool
    words: Int32
    count: int


class BodyGraphs:
    """Graphs that compute the hidden states after the stage's layers, for steps of at most `most` tokens, into `hidden_TE`."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Capturable,
        last_token: torch.Tensor,
        limits: tuple[int, int],
        recorder: GraphRecorder,
        num_cores: int,
    ) -> None:
        """`limits` are the most tokens of a captured step, and the rows that `hidden_TE` has at least."""
        (most, num_rows), device, cache = limits, decoder.device, backend.cache
        heads = (decoder.num_heads, decoder.spec.head_dim)
        self._decoder = decoder
        self._backend = backend
        self._cache = cache
        self._last_token = last_token
        self._recorder = recorder
        self._num_cores = num_cores
        self._hopper = hopper_tiles(cache, decoder.num_heads, decoder.dtype, num_cores)
        self._shape = tile_shape(cache.k_LNKPD.shape[3], decoder.num_heads, decoder.num_kv_heads, num_cores, self._hopper)
        self.hidden_TE = torch.zeros(max(most, num_rows), decoder.spec.hidden_size, dtype=decoder.dtype, device=device)
        self._queries_THD, self._mixed_THD = (torch.zeros(most, *heads, dtype=decoder.dtype, device=device) for _ in range(2))
        partial = max(ENOUGH_PLANES * most, MAX_PLANES * FINEST)
        self._state = torch.zeros(partial, *heads, dtype=decoder.dtype, device=device)
        self._lse = torch.zeros(partial, decoder.num_heads, device=device)
        self._counter = torch.zeros(2, dtype=torch.int32, device=device)
        self._max_tiles = TILES_A_TOKEN * most + LEAST_TILES
        self._words = torch.zeros(HEADER + 5 * aligned(most) + self._max_tiles * WORDS, dtype=torch.int32, device=device)
        self._ladder: Ladder[bool, torch.cuda.CUDAGraph] = Ladder(most, self._capture, worth_capturing(decoder.body_elements))

    def prepare(self) -> None:
        """Compile all kernels and capture the coarse sizes."""
        self._words.zero_()
        self._words[HEADER + aligned(1)] = self._cache.spare_slot
        for has_tiles in (True, False):
            self._recorder.trial(lambda has_tiles=has_tiles: self._compute(1, has_tiles))
        self._ladder.prepare(True)

    def fit(self, step: StepBatch) -> BodyStep | None:
        """Return the body for a step, or None if it is too large, has too many tiles, or consists mostly of long prompts (see
        LONG_PROMPT)."""
        count = step.num_tokens
        is_long_prefill = len(step.token_ids) >= max(MOSTLY, LONG_PROMPT * step.num_prefill_runs)
        if not 0 < count <= self._ladder.most or is_long_prefill:
            return None
        coarse = self._ladder.coarse(count)
        plan = plan_tiles(step, self._shape, self._num_planes(coarse))
        if plan is None or len(plan.wide_IW) + len(plan.narrow_IW) > self._max_tiles:
            return None
        has_tiles = plan.has_tiles
        size = self._ladder.size(count, has_tiles)
        if int(plan.planes_T.max()) > self._num_planes(size):
            # A graph of a larger size has fewer planes.
            plan = plan_tiles(step, self._shape, self._num_planes(size))
            if plan is None:
                return None
        return BodyStep(size, has_tiles, self._laid_out(step, plan, size), count)

    def make_ahead(self) -> bool:
        """See `Ladder`."""
        return self._ladder.make_ahead()

    def run(self, step: BodyStep, words: torch.Tensor) -> None:
        """Launch the body; `words` are the step's, on the device. A pipeline stage first receives the hidden states of the
        previous stage, and finally sends its own to the next."""
        self._words[: len(words)].copy_(words)
        graph, mesh = self._ladder.at(step.size, step.kind), self._decoder.mesh
        if not mesh.is_first_stage:
            self._decoder.receive(self.hidden_TE[: step.count])
            # Padding must be finite: its keys and values are written to a page that other samples may read under a mask.
            self.hidden_TE[step.count : step.size].zero_()
        graph.replay()
        if not mesh.is_last_stage:
            self._decoder.send(self.hidden_TE[: step.count])

    def _num_planes(self, size: int) -> int:
        return min(MAX_PLANES, len(self._state) // size)

    def _laid_out(self, step: StepBatch, plan: TilePlan, size: int) -> Int32:
        count, stride = step.num_tokens, aligned(size)
        columns = np.zeros((5, stride), np.int32)
        columns[0] = -1
        columns[0, : len(step.token_ids)] = step.token_ids
        if step.decode_ids is not None:
            columns[0, len(step.token_ids) : count] = step.decode_ids
        columns[1] = self._cache.spare_slot
        columns[1, :count], columns[2, :count] = token_slots(step), step.positions()
        columns[3, :count], columns[4, :count] = plan.own_T, plan.planes_T
        wide, narrow = plan.wide_IW.reshape(-1), plan.narrow_IW.reshape(-1)
        begin = HEADER + columns.size
        head = np.array((len(plan.wide_IW), len(plan.narrow_IW), begin, begin + len(wide)), np.int32)
        return np.concatenate((head, columns.reshape(-1), wide, narrow))

    def _capture(self, size: int, has_tiles: bool) -> torch.cuda.CUDAGraph:
        return self._recorder.capture(lambda: self._compute(size, has_tiles))[0]

    def _compute(self, size: int, has_tiles: bool) -> None:
        decoder, cache = self._decoder, self._cache
        columns = self._words[HEADER:].narrow(0, 0, 5 * aligned(size)).view(5, -1)[:, :size]
        token_T, slot_T, position_T, own_T, planes_T = columns
        queries, mixed = self._queries_THD[:size], self._mixed_THD[:size]
        planes = None
        if has_tiles:
            num = self._num_planes(size)
            state = self._state[: num * size].view(num, size, *self._state.shape[1:])
            planes = Planes(state, self._lse[: num * size].view(num, size, -1), self._counter)

        def attend(layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
            pages = cache.k_LNKPD[layer], cache.v_LNKPD[layer]
            if planes is not None:
                attend_tiles(layer, q_THD, cache, self._words, planes, self._num_cores, self._hopper)
            where = (slot_T, position_T, own_T, planes_T)
            decode_and_merge(q_THD, pages, cache.table, where, mixed, planes)
            return mixed

        hidden_TE = room_TE = self.hidden_TE[:size]
        if decoder.mesh.is_first_stage:
            last_T = self._last_token.index_select(0, slot_T)
            hidden_TE = decoder.embed(torch.where(token_T < 0, last_T, token_T))
        hidden_TE = decoder.run_layers(hidden_TE, position_T, attend, pages=KVPages(cache, slot_T, queries), may_scatter=False)
        if hidden_TE is not room_TE:
            room_TE.copy_(hidden_TE)


class CapturedSteps:
    """The graphs of a worker, for steps of at most `num_tokens` tokens. Larger steps write the hidden states of the rows that
    are drawn to `body.hidden_TE`, from the first row on, and use only the head."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Capturable,
        last_token: torch.Tensor,
        slots: SlotTable,
        num_tokens: int,
        recorder: GraphRecorder,
        num_cores: int,
    ) -> None:
        """`last_token`, `slots` and the backend's page table have an entry for each slot and for the spare slot. Attention is
        computed on `num_cores` multiprocessors of the device."""
        num_rows = len(last_token) - 1
        self._slots = slots
        self._has_head = decoder.mesh.is_last_stage
        self.backend = backend
        self.body = BodyGraphs(decoder, backend, last_token, (num_tokens, num_rows), recorder, num_cores)
        self.head = HeadGraphs(decoder, self.body.hidden_TE, last_token, slots, num_rows, recorder)

    def prepare(self) -> None:
        """Compile all kernels and capture the coarse sizes of body and head, the head for the kinds of drawing that the slots
        have been opened for so far."""
        self.body.prepare()
        if self._has_head:
            self.head.prepare(HeadKind(*self._slots.kinds(np.arange(len(self._slots.words) - 1, dtype=np.int32))))

    def make_ahead(self) -> bool:
        """Capture one graph for later steps. Return False if there is none to capture."""
        return self.body.make_ahead() or self.head.make_ahead()


def captured_on_gpu(
    decoder: Decoder, backend: Capturable, last_token: torch.Tensor, slots: SlotTable, num_tokens: int
) -> CapturedSteps:
    """Return the graphs of a worker on the decoder's GPU, with kernels compiled and the coarse sizes captured."""
    cores = torch.cuda.get_device_properties(decoder.device).multi_processor_count
    captured = CapturedSteps(decoder, backend, last_token, slots, num_tokens, GraphRecorder(), cores)
    captured.prepare()
    # Return the memory that the trial runs took.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return captured
