"""One forward pass for every family. The differences are fields of `ModelSpec` and tensors that are there or not.

A Decoder holds one pipeline stage: a contiguous range of layers, the first stage also the embedding, the last also the
final norm and the head. Its tensor-parallel shard holds some of the heads, feed-forward columns and vocabulary rows. It
keeps no state between calls, waits for no device and branches on nothing that lies in a tensor: where `attend` does likewise,
all layers can be captured in a CUDA graph. Where keys and values are kept and what attends to what is the business of `attend`.

Shape legend: T tokens of a step, S rows with logits, E hidden size, H query heads, K key-value heads, D head dimension,
F feed-forward size, V vocabulary; sizes are this shard's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tokabatch.attention.capturable import PagedCache
from tokabatch.model.layers import fused, rms_norm, rotate
from tokabatch.model.linear import Input, Linear, gated_by, gated_for, normed_for
from tokabatch.model.partition import VocabularyShard, kv_heads, stage_layers
from tokabatch.model.scattering import Scattering, measure_scattering
from tokabatch.model.spec import ModelSpec
from tokabatch.parallel.collectives import all_gather_last, all_reduce, compare_choice, receive_hidden, send_hidden
from tokabatch.parallel.mesh import Mesh
from tokabatch.parallel.peer_links import PeerLinks
from tokabatch.parallel.peer_memory import PeerSums

Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""q_THD, k_TKD and v_TKD, rotated by their positions; keys and values are None if they are in their cache already."""

Attend = Callable[[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""attend(layer, *heads) -> o_THD. `layer` counts from 0 within the stage; the scale 1 / sqrt(D) is attend's. The heads are
views of larger buffers, contiguous in D, and valid until attend returns."""


@dataclass(frozen=True, slots=True)
class KVPages:
    """A paged cache that the decoder writes itself, on a GPU: rotating and storing are one kernel there.

    `slot_T` is the slot of each of the step's tokens, int32; the cache's table maps it and a position // P to a page. The
    rotated queries go to `q_THD` where that is given.
    """

    cache: PagedCache
    slot_T: torch.Tensor
    q_THD: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's shard. `qkv` holds the query, key and value heads one after another, `gate_up` gate and up."""

    attention_norm_E: torch.Tensor
    qkv: Linear
    qk_norm_HD: torch.Tensor | None
    """One weight per query head, then per key head."""
    o: Linear
    mlp_norm_E: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A stage's tensors: `embed_VE` on the first stage, `final_norm_E` and `head` on the last."""

    layers: tuple[LayerWeights, ...]
    rotary_P1D: torch.Tensor
    embed_VE: torch.Tensor | None
    final_norm_E: torch.Tensor | None
    head: Linear | None


class Decoder:
    """See the module's docstring. Build it with `weights.load_decoder`."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, weights: DecoderWeights) -> None:
        self.spec = spec
        self.mesh = mesh
        self.vocabulary = VocabularyShard.of(spec.vocab_size, mesh)
        self.layer_range = stage_layers(spec, mesh)
        self.num_heads = len(mesh.shard(spec.num_heads))
        self.num_kv_heads = len(kv_heads(spec, mesh))
        self.peer_sums: PeerSums | None = None
        """Sums over tensor ranks on a GPU through peer memory, if available."""
        self.peer_links: PeerLinks | None = None
        """Likewise messages between stages."""
        self.scattering: Scattering | None = None
        """Scatters the tokens of large steps over tensor ranks, if that was measured to be faster."""
        self.dtype = weights.rotary_P1D.dtype
        self.device = weights.rotary_P1D.device
        self._weights = weights

    @property
    def body_elements(self) -> int:
        """The size of the matrices that each token is multiplied with in the stage's layers, on the tensor rank with the
        largest shard: graphs are chosen by it, and all ranks must choose alike."""
        spec = self.spec
        heads = 2 * (self.num_heads + self.num_kv_heads) * spec.head_dim
        mlp = 3 * -(-spec.intermediate_size // self.mesh.tensor_size)
        return len(self.layer_range) * spec.hidden_size * (heads + mlp)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        logit_rows_S: torch.Tensor | None = None,
        pages: KVPages | None = None,
    ) -> torch.Tensor:
        """Return logits_SV of the tokens at `logit_rows_S` (indices into T; None: all), in the model's dtype; on a pipeline
        stage that is not the last, an empty [0, V]. All three index tensors are int32 or int64 on the decoder's device."""
        hidden = self.hidden(token_ids_T, positions_T, attend, logit_rows_S, pages)
        if not self.mesh.is_last_stage:
            return hidden.new_empty(0, self.spec.vocab_size)
        return all_gather_last(self.logits(hidden), self.mesh)[:, : self.spec.vocab_size].contiguous()

    def hidden(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        logit_rows_S: torch.Tensor | None = None,
        pages: KVPages | None = None,
    ) -> torch.Tensor:
        """Return what `forward` computes logits from: hidden_SE after the stage's layers; on a stage that is not the last
        hidden_TE, the input of the next one."""
        if self.mesh.is_first_stage:
            hidden_TE = self.embed(token_ids_T)
        else:
            shape = (token_ids_T.shape[0], self.spec.hidden_size)
            hidden_TE = self.receive(torch.empty(shape, dtype=self.dtype, device=self.device))
        hidden = self.run_layers(hidden_TE, positions_T, attend, logit_rows_S, pages)
        if not self.mesh.is_last_stage:
            self.send(hidden)
        return hidden

    def receive(self, room_TE: torch.Tensor) -> torch.Tensor:
        """Fill `room_TE` with the next hidden states from the previous stage, which must have its shape, and return it. On a
        GPU the stream waits for them, not the host. Not on the first stage."""
        link = self.peer_links and self.peer_links.before
        return receive_hidden(room_TE, self.mesh) if link is None else link.receive(room_TE)

    def send(self, hidden_TE: torch.Tensor) -> None:
        """Send a copy of the hidden states, whose memory may be written to again, to the next stage. Not on the last stage."""
        link = self.peer_links and self.peer_links.behind
        if link is None:
            send_hidden(hidden_TE.clone(), self.mesh)
        else:
            link.send(hidden_TE)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Return hidden_TE of the tokens, a fresh tensor. First stage only."""
        embed_VE = self._weights.embed_VE
        assert embed_VE is not None, "the embedding is on the first stage"
        if self.mesh.tensor_size == 1:
            return embed_VE.index_select(0, token_ids_T)
        own = self.vocabulary.tokens
        local_T = token_ids_T - own.start
        foreign_T = (local_T < 0) | (local_T >= len(own))
        hidden_TE = embed_VE.index_select(0, local_T.masked_fill_(foreign_T, 0)).masked_fill_(foreign_T[:, None], 0.0)
        return all_reduce(hidden_TE, self.mesh)

    def run_layers(
        self,
        hidden_TE: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        logit_rows_S: torch.Tensor | None = None,
        pages: KVPages | None = None,
        may_scatter: bool = True,
    ) -> torch.Tensor:
        """Apply the stage's layers; may overwrite `hidden_TE`. Returns hidden_TE, or hidden_SE after the model's last layer:
        from its attention on, only rows that get logits are computed. `may_scatter`: see `scattering`, which must not be
        captured."""
        if pages is None:
            cos, sin = self._weights.rotary_P1D.index_select(0, positions_T).chunk(2, dim=-1)
            to_heads = partial(self._rotate, cos=cos, sin=sin)
        else:
            to_heads = partial(self._rotate_and_store, positions_T=positions_T, pages=pages)
        hidden, first = hidden_TE, 0
        scattering = self.scattering if may_scatter else None
        overlapping = scattering and scattering.products(len(hidden_TE))
        if may_scatter:
            which = None if overlapping is None else sorted(overlapping)
            compare_choice(lambda: f"products of {len(hidden_TE)} tokens, scattered: {which}", self.mesh)
        if scattering is not None and overlapping is not None:
            # The model's last layer drops rows, so every rank needs all of them.
            first = len(self.layer_range) - self.mesh.is_last_stage
            hidden = self._scattered_layers(range(first), hidden_TE, to_heads, attend, scattering, overlapping)
        for index in range(first, len(self.layer_range)):
            is_last = self.layer_range[index] == self.spec.num_layers - 1
            hidden = self._layer(index, hidden, to_heads, attend, logit_rows_S if is_last else None)
        return hidden

    def _layer(
        self,
        index: int,
        hidden_TE: torch.Tensor,
        to_heads: Callable[[int, torch.Tensor], Heads],
        attend: Attend,
        kept_rows_S: torch.Tensor | None,
    ) -> torch.Tensor:
        """Apply one layer, top to bottom; may overwrite `hidden_TE`. With `kept_rows_S`, other rows only contribute keys and
        values."""
        layer, hidden = self._weights.layers[index], hidden_TE
        # Results of products are passed on without a name, so that their memory is freed as soon as they are used.
        mixed = attend(index, *to_heads(index, self._project(layer.qkv, layer.attention_norm_E, hidden))).flatten(1)
        if kept_rows_S is not None:
            mixed, hidden = mixed.index_select(0, kept_rows_S), hidden.index_select(0, kept_rows_S)
        hidden = self._add_to(hidden, layer.o, mixed)
        normed = normed_for(layer.gate_up, hidden, layer.mlp_norm_E, self.spec.rms_norm_eps)
        gated = gated_by(layer.gate_up, layer.down, normed)
        return self._add_to(hidden, layer.down, gated)

    def _scattered_layers(
        self,
        layers: range,
        hidden_TE: torch.Tensor,
        to_heads: Callable[[int, torch.Tensor], Heads],
        attend: Attend,
        scattering: Scattering,
        overlapping: frozenset[str],
    ) -> torch.Tensor:
        """Apply some layers with the tokens scattered over tensor ranks, except for attention and the gated activation."""
        count, eps = len(hidden_TE), self.spec.rms_norm_eps
        own = scattering.scatter(hidden_TE)
        for index in layers:
            layer = self._weights.layers[index]
            normed = rms_norm(own, layer.attention_norm_E, eps)
            qkv = scattering.column(layer.qkv, normed, "qkv" in overlapping)[:count]
            mixed = attend(index, *to_heads(index, qkv)).flatten(1)
            own.add_(scattering.row(layer.o, mixed, "o" in overlapping))
            gate_up = scattering.column(layer.gate_up, rms_norm(own, layer.mlp_norm_E, eps), "gate_up" in overlapping)
            own.add_(scattering.row(layer.down, gated_for(layer.down, gate_up), "down" in overlapping))
        return scattering.gather(own, count)

    def measure_scattering(self, most_tokens: int) -> None:
        """Measure what is faster for steps of up to `most_tokens` tokens, scattered over the tensor ranks or not, and use it
        from now on. All tensor ranks must call it."""
        has_row_bias = self.spec.o_bias or self.spec.mlp_bias
        self.scattering = measure_scattering(self._weights.layers[0], self.mesh, has_row_bias, most_tokens)

    def _project(self, linear: Linear, norm_E: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return linear(normed_for(linear, hidden, norm_E, self.spec.rms_norm_eps))

    def _rotate(self, index: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
        """Return the heads in `qkv`, queries and keys normalised if the family does so, and rotated."""
        norm, num_rotated = self._weights.layers[index].qk_norm_HD, self.num_heads + self.num_kv_heads
        heads = qkv.view(-1, num_rotated + self.num_kv_heads, self.spec.head_dim)
        qk = heads[:, :num_rotated]
        qk = rotate(qk if norm is None else rms_norm(qk, norm, self.spec.rms_norm_eps), cos, sin)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], heads[:, num_rotated:]

    def _rotate_and_store(self, index: int, qkv: torch.Tensor, positions_T: torch.Tensor, pages: KVPages) -> Heads:
        """Do the same in one kernel, which also writes keys and values to the cache."""
        norm, eps, kept = self._weights.layers[index].qk_norm_HD, self.spec.rms_norm_eps, pages.cache
        angles_PD = self._weights.rotary_P1D[:, 0]
        place = positions_T, pages.slot_T, kept.table
        cache = kept.k_LNKPD[index], kept.v_LNKPD[index]
        q_THD = fused().rotate_and_store(qkv, angles_PD, norm, eps, *place, cache, self.num_heads, pages.q_THD)
        return q_THD, None, None

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Return logits_SV of this rank's `vocabulary`, padding included. Last stage only."""
        norm_E, head = self._weights.final_norm_E, self._weights.head
        assert norm_E is not None and head is not None, "the head is on the last stage"
        return head(rms_norm(hidden_SE, norm_E, self.spec.rms_norm_eps))

    def _add_to(self, residual: torch.Tensor, linear: Linear, x: Input) -> torch.Tensor:
        if self.mesh.tensor_size == 1:
            return linear.add_to(residual, x)
        sums = self.peer_sums
        if sums is None or not sums.holds(len(residual)):
            return residual.add_(all_reduce(linear(x), self.mesh))
        return residual.add_(sums.sum(linear.into(sums.room(len(residual)), x)))
