"""One forward pass for every family. The differences are fields of `ModelSpec` and tensors that are there or not.

A Decoder holds one pipeline stage: a contiguous range of layers, the first stage also the embedding, the last also the
final norm and the head. Its tensor-parallel shard holds some of the heads, feed-forward columns and vocabulary rows. It
keeps no state between calls, waits for no device and branches on nothing that lies in a tensor: everything between two
calls of `attend` can be captured in a CUDA graph. Where keys and values are kept and what attends to what is the business of
`attend`.

Shape legend: T tokens of a step, S rows with logits, E hidden size, H query heads, K key-value heads, D head dimension,
F feed-forward size, V vocabulary; sizes are this shard's except in `logits_SV`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokabatch.model.layers import fused, rms_norm, rotate
from tokabatch.model.linear import Input, Linear, gated_for, normed_for
from tokabatch.model.spec import ModelSpec
from tokabatch.parallel.collectives import all_gather_last, all_reduce, receive_hidden, send_hidden
from tokabatch.parallel.mesh import Mesh

Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""q_THD, k_TKD and v_TKD, turned by their positions; keys and values are None where they are in their cache already."""

Attend = Callable[[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""attend(layer, *heads) -> o_THD. `layer` counts from 0 within the stage; the scale 1 / sqrt(D) is attend's. The heads are
views of larger buffers, contiguous in D, and valid until attend returns."""


@dataclass(frozen=True, slots=True)
class KVPages:
    """A paged cache that the decoder writes itself, on a GPU: turning and storing are one kernel there.

    Keys and values are [layers, pages, K, P, D] each; `table` [slots, columns] maps a token's slot and its position // P to
    a page; `slot_T` is the slot of each of the step's tokens. Table and slots are int32. The turned queries go to `q_THD`
    where that is given.
    """

    k_LNKPD: torch.Tensor
    v_LNKPD: torch.Tensor
    table: torch.Tensor
    slot_T: torch.Tensor
    q_THD: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where a step's tokens stand: their positions, the angles of those unless a kernel looks them up itself, and the
    cache if the decoder is to write it."""

    positions_T: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    pages: KVPages | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's shard. The query, key and value heads stand one after another in `qkv`, gate and up in `gate_up`."""

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
    """A stage's tensors. `embed_VE` is there on the first stage, `final_norm_E` and `head` on the last."""

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
        self.layer_range = mesh.stage_layers(spec.num_layers)
        self.num_heads = len(mesh.shard(spec.num_heads))
        self.num_kv_heads = len(mesh.shard(spec.num_kv_heads))
        self.dtype = weights.rotary_P1D.dtype
        self.device = weights.rotary_P1D.device
        self._weights = weights

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        logit_rows_S: torch.Tensor | None = None,
        pages: KVPages | None = None,
    ) -> torch.Tensor:
        """logits_SV of the tokens at `logit_rows_S` (indices into T; None: all), in the model's dtype; on a pipeline stage that
        is not the last, an empty [0, V]. All three index tensors are int32 or int64 on the decoder's device."""
        hidden = self.hidden(token_ids_T, positions_T, attend, logit_rows_S, pages)
        if self.mesh.is_last_stage:
            return self.logits(hidden)
        send_hidden(hidden, self.mesh)
        return hidden.new_empty(0, self.spec.vocab_size)

    def hidden(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        logit_rows_S: torch.Tensor | None = None,
        pages: KVPages | None = None,
    ) -> torch.Tensor:
        """What `forward` makes logits of: hidden_SE behind the stage's layers, on a stage that is not the last hidden_TE."""
        if self.mesh.is_first_stage:
            hidden_TE = self.embed(token_ids_T)
        else:
            shape = (token_ids_T.shape[0], self.spec.hidden_size)
            hidden_TE = receive_hidden(torch.empty(shape, dtype=self.dtype, device=self.device), self.mesh)
        return self.run_layers(hidden_TE, self.places(positions_T, pages), attend, logit_rows_S)

    def places(self, positions_T: torch.Tensor, pages: KVPages | None) -> Places:
        """What `enter` needs of the step's tokens."""
        if pages is not None:
            return Places(positions_T, None, None, pages)
        cos, sin = self._weights.rotary_P1D.index_select(0, positions_T).chunk(2, dim=-1)
        return Places(positions_T, cos, sin, None)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """hidden_TE of the tokens, a fresh tensor. First stage only."""
        embed_VE = self._weights.embed_VE
        assert embed_VE is not None, "the embedding is on the first stage"
        if self.mesh.tensor_size == 1:
            return embed_VE.index_select(0, token_ids_T)
        own = self.mesh.shard(self.spec.vocab_size)
        local_T = token_ids_T - own.start
        foreign_T = (local_T < 0) | (local_T >= len(own))
        hidden_TE = embed_VE.index_select(0, local_T.masked_fill_(foreign_T, 0)).masked_fill_(foreign_T[:, None], 0.0)
        return all_reduce(hidden_TE, self.mesh)

    def run_layers(
        self, hidden_TE: torch.Tensor, places: Places, attend: Attend, logit_rows_S: torch.Tensor | None
    ) -> torch.Tensor:
        """The stage's layers; may overwrite `hidden_TE`. Returns hidden_TE, or hidden_SE after the model's last layer:
        from its attention on, only the rows that get logits go through."""
        hidden = hidden_TE
        for index in range(len(self.layer_range)):
            mixed_THD = attend(index, *self.enter(index, hidden, places))
            hidden = self.leave(index, hidden, mixed_THD, logit_rows_S)
        return hidden

    def enter(self, index: int, hidden_TE: torch.Tensor, places: Places) -> Heads:
        """A layer up to its attention: the heads that go into it."""
        layer, eps = self._weights.layers[index], self.spec.rms_norm_eps
        qkv = layer.qkv(normed_for(layer.qkv, hidden_TE, layer.attention_norm_E, eps))
        pages, norm = places.pages, layer.qk_norm_HD
        if pages is not None:
            cache = pages.k_LNKPD[index], pages.v_LNKPD[index]
            angles_PD = self._weights.rotary_P1D[:, 0]
            place = places.positions_T, pages.slot_T, pages.table
            q_THD = fused().rotate_and_store(qkv, angles_PD, norm, eps, *place, cache, self.num_heads, pages.q_THD)
            return q_THD, None, None
        assert places.cos is not None and places.sin is not None
        num_rotated = self.num_heads + self.num_kv_heads
        heads = qkv.view(-1, num_rotated + self.num_kv_heads, self.spec.head_dim)
        qk = heads[:, :num_rotated]
        qk = rotate(qk if norm is None else rms_norm(qk, norm, eps), places.cos, places.sin)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], heads[:, num_rotated:]

    def leave(
        self, index: int, hidden_TE: torch.Tensor, mixed_THD: torch.Tensor, logit_rows_S: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A layer from its attention on; may overwrite `hidden_TE`. In the model's last layer, for the given rows alone."""
        layer, hidden, mixed = self._weights.layers[index], hidden_TE, mixed_THD.flatten(1)
        if logit_rows_S is not None and self.layer_range[index] == self.spec.num_layers - 1:
            mixed, hidden = mixed.index_select(0, logit_rows_S), hidden.index_select(0, logit_rows_S)
        hidden = self._add_to(hidden, layer.o, mixed)
        normed = normed_for(layer.gate_up, hidden, layer.mlp_norm_E, self.spec.rms_norm_eps)
        return self._add_to(hidden, layer.down, gated_for(layer.down, layer.gate_up(normed)))

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """logits_SV over the whole vocabulary. Last stage only."""
        norm_E, head = self._weights.final_norm_E, self._weights.head
        assert norm_E is not None and head is not None, "the head is on the last stage"
        local = head(rms_norm(hidden_SE, norm_E, self.spec.rms_norm_eps))
        if self.mesh.tensor_size == 1:
            return local
        return all_gather_last(local, self.mesh)[:, : self.spec.vocab_size].contiguous()

    def _add_to(self, residual: torch.Tensor, linear: Linear, x: Input) -> torch.Tensor:
        if self.mesh.tensor_size == 1:
            return linear.add_to(residual, x)
        return residual.add_(all_reduce(linear(x), self.mesh))
