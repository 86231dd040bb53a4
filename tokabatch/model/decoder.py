"""One forward pass for every family. The differences are fields of `ModelSpec` and tensors that are there or not.

A Decoder holds one pipeline stage: a contiguous range of layers, the first stage also the embedding, the last also the
final norm and the head. Its tensor-parallel shard holds some of the heads, feed-forward columns and vocabulary rows. It
keeps no state between calls, waits for no device and branches on nothing that lies in a tensor. Where keys and values
are kept and what attends to what is the business of `attend`.

Shape legend: T tokens of a step, S rows with logits, E hidden size, H query heads, K key-value heads, D head dimension,
F feed-forward size, V vocabulary; sizes are this shard's except in `logits_SV`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokabatch.model.layers import gate, rms_norm, rotate
from tokabatch.model.linear import Linear
from tokabatch.model.spec import ModelSpec
from tokabatch.parallel.collectives import all_gather_last, all_reduce, receive_hidden, send_hidden
from tokabatch.parallel.mesh import Mesh

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attend(layer, q_THD, k_TKD, v_TKD) -> o_THD. `layer` counts from 0 within the stage; q and k are rotated already; the
scale 1 / sqrt(D) is attend's. The three are views of larger buffers, contiguous in D, and valid until attend
returns."""


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
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, attend: Attend, logit_rows_S: torch.Tensor
    ) -> torch.Tensor:
        """logits_SV of the tokens at `logit_rows_S` (indices into T), in the model's dtype; on a pipeline stage that is
        not the last, an empty [0, V]. All three index tensors are int32 or int64 on the decoder's device."""
        if self.mesh.is_first_stage:
            hidden_TE = self.embed(token_ids_T)
        else:
            shape = (token_ids_T.shape[0], self.spec.hidden_size)
            hidden_TE = receive_hidden(torch.empty(shape, dtype=self.dtype, device=self.device), self.mesh)
        hidden = self.run_layers(hidden_TE, positions_T, attend, logit_rows_S)
        if self.mesh.is_last_stage:
            return self.logits(hidden)
        send_hidden(hidden, self.mesh)
        return hidden.new_empty(0, self.spec.vocab_size)

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
        self, hidden_TE: torch.Tensor, positions_T: torch.Tensor, attend: Attend, logit_rows_S: torch.Tensor
    ) -> torch.Tensor:
        """The stage's layers; may overwrite `hidden_TE`. Returns hidden_TE, or hidden_SE after the model's last layer:
        from its attention on, only the rows that get logits go through."""
        cos, sin = self._weights.rotary_P1D.index_select(0, positions_T).chunk(2, dim=-1)
        eps = self.spec.rms_norm_eps
        hidden = hidden_TE
        for index, layer in enumerate(self._weights.layers):
            q_THD, k_TKD, v_TKD = self._heads(layer, rms_norm(hidden, layer.attention_norm_E, eps), cos, sin)
            mixed = attend(index, q_THD, k_TKD, v_TKD).reshape(hidden.shape[0], -1)
            if self.layer_range[index] == self.spec.num_layers - 1:
                mixed, hidden = mixed.index_select(0, logit_rows_S), hidden.index_select(0, logit_rows_S)
            hidden = self._add_to(hidden, layer.o, mixed)
            gated = gate(layer.gate_up(rms_norm(hidden, layer.mlp_norm_E, eps)))
            hidden = self._add_to(hidden, layer.down, gated)
        return hidden

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """logits_SV over the whole vocabulary. Last stage only."""
        norm_E, head = self._weights.final_norm_E, self._weights.head
        assert norm_E is not None and head is not None, "the head is on the last stage"
        local = head(rms_norm(hidden_SE, norm_E, self.spec.rms_norm_eps))
        if self.mesh.tensor_size == 1:
            return local
        return all_gather_last(local, self.mesh)[:, : self.spec.vocab_size].contiguous()

    def _heads(
        self, layer: LayerWeights, x_TE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = layer.qkv(x_TE).view(-1, num_rotated + self.num_kv_heads, self.spec.head_dim)
        qk = qkv[:, :num_rotated]
        if layer.qk_norm_HD is not None:
            qk = rms_norm(qk, layer.qk_norm_HD, self.spec.rms_norm_eps)
        qk = rotate(qk, cos, sin)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], qkv[:, num_rotated:]

    def _add_to(self, residual: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        if self.mesh.tensor_size == 1:
            return linear.add_to(residual, x)
        return residual.add_(all_reduce(linear(x), self.mesh))
