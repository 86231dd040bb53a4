"""Steps as two CUDA graphs: what a step computes is launched at once, whatever the number of layers.

The body takes tokens to hidden states: embedding and all layers, attention included, whose launches depend on nothing but the
number of tokens (`attention.tiles`); any step that is not too large has one, prefill or not. The head takes hidden states to
drawn tokens: the logits and the sampler, which also leaves each token where the next step's body reads it. A step is filled up
to a captured size with tokens of the spare slot. What a graph reads of a step lies in fixed buffers, written by one copy each
before it is replayed.

A pipeline stage has the graphs of its own part: an embedding on the first stage alone, a head on the last alone. What stages
exchange stays outside: a body begins and ends in a buffer that is filled before the replay, and copied and sent behind it. So
each stage chooses its graphs for itself, and one may run a step kernel by kernel that another runs as a graph.

Imports triton: only a worker on a GPU loads this module. Shape legend: T tokens, S sampled rows, H query heads, D head
dimension, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention.base import token_slots
from tokabatch.attention.capturable import Capturable, PrefixKind, PrefixPass
from tokabatch.attention.tiles import ENOUGH_PLANES, MAX_PLANES, WORDS, TilePlan, plan_tiles
from tokabatch.attention.triton_decode import decode_and_merge
from tokabatch.attention.triton_tiles import Planes, attend_tiles, tile_shape
from tokabatch.engine.captured_head import HeadGraphs, HeadKind
from tokabatch.engine.graphs import FINEST, GraphRecorder, Ladder, aligned, coarse_size
from tokabatch.model.decoder import Decoder, KVPages
from tokabatch.model.sampling.slot_table import SlotTable
from tokabatch.scheduling.contracts import StepBatch

TILES_A_TOKEN, LEAST_TILES = 2, 8192
"""Tiles that a step may have."""
HEADER = 8
"""Words before the columns of tokens: of the tiles, four; the slot of the prefix."""
MOST_PREFIXES = 8
"""Lengths of a prefix that get graphs of their own."""
LONG_PROMPT, MOSTLY = 512, 4096
"""Tokens of a prompt, on average, and of all prompts, from which a step is launched kernel by kernel: it takes longer than
its launches, and kernels of one purpose are faster at long prompts."""


@dataclass(frozen=True, slots=True)
class BodyKind:
    """`tiles`: something is attended to in tiles, or by a kernel of the backend's over a `prefix` of all tokens."""

    tiles: bool
    prefix: PrefixKind | None = None


@dataclass(frozen=True, slots=True)
class BodyStep:
    """A step's body: the graph it runs, what that reads, and how many tokens of `size` are the step's."""

    size: int
    kind: BodyKind
    words: Int32
    count: int


class BodyGraphs:
    """Hidden states behind the stage's layers, of steps of at most `most` tokens, left in `hidden_TE`."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Capturable,
        last_token: torch.Tensor,
        limits: tuple[int, int],
        recorder: GraphRecorder,
        num_cores: int,
    ) -> None:
        """`limits`: tokens of a step, and rows of hidden states beside."""
        (most, num_rows), device, cache = limits, decoder.device, backend.cache
        heads = (decoder.num_heads, decoder.spec.head_dim)
        self._decoder = decoder
        self._backend = backend
        self._cache = cache
        self._prefixes: dict[tuple[int, PrefixKind], PrefixPass] = {}
        """What graphs read, by size."""
        self._last_token = last_token
        self._recorder = recorder
        self._num_cores = num_cores
        self._shape = tile_shape(cache.k_LNKPD.shape[3], decoder.num_heads, decoder.num_kv_heads, num_cores)
        self.hidden_TE = torch.zeros(max(most, num_rows), decoder.spec.hidden_size, dtype=decoder.dtype, device=device)
        self._queries_THD, self._mixed_THD = (torch.zeros(most, *heads, dtype=decoder.dtype, device=device) for _ in range(2))
        partial = max(ENOUGH_PLANES * most, MAX_PLANES * FINEST)
        self._state = torch.zeros(partial, *heads, dtype=decoder.dtype, device=device)
        self._lse = torch.zeros(partial, decoder.num_heads, device=device)
        self._counter = torch.zeros(2, dtype=torch.int32, device=device)
        self._max_tiles = TILES_A_TOKEN * most + LEAST_TILES
        self._words = torch.zeros(HEADER + 5 * aligned(most) + self._max_tiles * WORDS, dtype=torch.int32, device=device)
        self._ladder: Ladder[BodyKind, torch.cuda.CUDAGraph] = Ladder(most, self._capture)

    def prepare(self) -> None:
        """Compile all kernels, and capture the sizes that most steps run at."""
        self._words.zero_()
        self._words[HEADER + aligned(1)] = self._cache.spare_slot
        for kind in (BodyKind(tiles=True), BodyKind(tiles=False)):
            self._recorder.trial(lambda kind=kind: self._compute(1, kind))
        self._ladder.prepare(BodyKind(tiles=True))

    def fit(self, step: StepBatch) -> BodyStep | None:
        """None for a step that is too large, or mostly long prompts: kernels of one purpose are faster at those."""
        count = step.num_tokens
        is_long_prefill = len(step.token_ids) >= max(MOSTLY, LONG_PROMPT * step.num_prefill_runs)
        if not 0 < count <= self._ladder.most or is_long_prefill:
            return None
        coarse = coarse_size(count, self._ladder.most)
        prefix = self._prefix_of(step, coarse)
        plan = plan_tiles(step, self._shape, self._num_planes(coarse), prefix)
        if plan is None or len(plan.wide_IW) + len(plan.narrow_IW) > self._max_tiles:
            return None
        kind = BodyKind(plan.has_tiles or prefix is not None, prefix)
        size = self._ladder.size(count, kind)
        if int(plan.planes_T.max()) > self._num_planes(size):
            # A larger graph than the step's own has fewer.
            plan = plan_tiles(step, self._shape, self._num_planes(size), prefix)
            if plan is None:
                return None
        return BodyStep(size, kind, self._laid_out(step, plan, size), count)

    def _prefix_of(self, step: StepBatch, size: int) -> PrefixKind | None:
        """Of a prefix that all tokens share, where the backend has a faster kernel and not too many lengths had graphs."""
        level = step.prefix_levels[0] if step.prefix_levels else None
        if level is None or len(level.slot) != 1 or level.token_stop[0] - level.token_start[0] != step.num_tokens:
            return None
        kind = self._backend.prefix_kind(size, int(level.page_stop[0] - level.page_start[0]))
        known = {each for _, each in self._prefixes}
        return kind if kind in known or len(known) < MOST_PREFIXES else None

    def make_ahead(self) -> bool:
        """See `Ladder`."""
        return self._ladder.make_ahead()

    def run(self, step: BodyStep, words: torch.Tensor) -> None:
        """Launch it; `words` are the step's, on the device. On a pipeline stage it begins with what the previous one sends, and
        ends with sending to the next one."""
        self._words[: len(words)].copy_(words)
        graph, mesh = self._ladder.at(step.size, step.kind), self._decoder.mesh
        if not mesh.is_first_stage:
            self._decoder.receive(self.hidden_TE[: step.count])
            # What fills up is finite: its keys and values lie in a page that others may read and mask.
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
        begin, slot = HEADER + columns.size, step.prefix_levels[0].slot[0] if step.prefix_levels else 0
        head = np.array((len(plan.wide_IW), len(plan.narrow_IW), begin, begin + len(wide), slot, 0, 0, 0), np.int32)
        return np.concatenate((head, columns.reshape(-1), wide, narrow))

    def _capture(self, size: int, kind: BodyKind) -> torch.cuda.CUDAGraph:
        if kind.prefix is not None:
            # Planned here, as that cannot be captured.
            self._prefixes[size, kind.prefix] = self._backend.prefix_pass(kind.prefix, size)
        return self._recorder.capture(lambda: self._compute(size, kind))[0]

    def _compute(self, size: int, kind: BodyKind) -> None:
        decoder, cache = self._decoder, self._cache
        columns = self._words[HEADER:].narrow(0, 0, 5 * aligned(size)).view(5, -1)[:, :size]
        token_T, slot_T, position_T, own_T, planes_T = columns
        queries, mixed = self._queries_THD[:size], self._mixed_THD[:size]
        planes, prefix = None, None if kind.prefix is None else self._prefixes[size, kind.prefix]
        if prefix is not None:
            prefix.begin(self._words[4:5])
        if kind.tiles:
            num = self._num_planes(size)
            state = self._state[: num * size].view(num, size, *self._state.shape[1:])
            planes = Planes(state, self._lse[: num * size].view(num, size, -1), self._counter)

        def attend(layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
            pages = cache.k_LNKPD[layer], cache.v_LNKPD[layer]
            if planes is not None and prefix is not None and kind.prefix is not None:
                parts = kind.prefix.parts
                prefix.attend(layer, q_THD, planes.state_NTHD[:parts], planes.lse_NTH[:parts])
            if planes is not None:
                attend_tiles(q_THD, pages, cache.table, self._words, planes, self._num_cores)
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
    """The graphs of a worker, for steps of at most `num_tokens` tokens; larger ones leave their hidden states in
    `body.hidden_TE`, a row each from the first on, and use the head alone."""

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
        """`last_token` and the backend's page table have an entry for each slot and the spare one, `slots` likewise;
        `num_cores` of the device's multiprocessors compute attention."""
        num_rows = len(last_token) - 1
        self._slots = slots
        self._has_head = decoder.mesh.is_last_stage
        self.backend = backend
        self.body = BodyGraphs(decoder, backend, last_token, (num_tokens, num_rows), recorder, num_cores)
        self.head = HeadGraphs(decoder, self.body.hidden_TE, last_token, slots, num_rows, recorder)

    def prepare(self) -> None:
        """Compile all kernels, and capture coarse sizes of each: what the slots have been opened for so far is drawn."""
        self.body.prepare()
        if self._has_head:
            self.head.prepare(HeadKind(*self._slots.kinds(np.arange(len(self._slots.words) - 1, dtype=np.int32))))

    def make_ahead(self) -> bool:
        """Capture one graph that will be wanted; False where there is none."""
        return self.body.make_ahead() or self.head.make_ahead()


def captured_on_gpu(
    decoder: Decoder, backend: Capturable, last_token: torch.Tensor, slots: SlotTable, num_tokens: int
) -> CapturedSteps:
    """Ready to run on the decoder's device."""
    cores = torch.cuda.get_device_properties(decoder.device).multi_processor_count
    captured = CapturedSteps(decoder, backend, last_token, slots, num_tokens, GraphRecorder(), cores)
    captured.prepare()
    # The memory that the trials took is free now.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return captured
