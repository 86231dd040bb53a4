"""Fills a Decoder from safetensors: each checkpoint tensor, or this rank's part of it, is copied from the mapped file
to its place in a preallocated fused parameter. The model is never twice in host memory.

On the CPU in float32 the matrices are then packed one by one (`linear.PackedLinear`); a tied head is packed apart from
the embedding there, the only weights that are held twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tokabatch.errors import ModelError
from tokabatch.model.checkpoint import Checkpoint, preflight
from tokabatch.model.decoder import Decoder, DecoderWeights, LayerWeights
from tokabatch.model.layers import rotary_table
from tokabatch.model.linear import Linear, make_linear
from tokabatch.model.partition import VocabularyShard, check_mesh, kv_heads, stage_layers
from tokabatch.model.spec import EMBEDDING, HEAD, ModelSpec, layer_prefix
from tokabatch.parallel.mesh import Mesh

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint tensor goes: `target` takes its rows and columns (None: all of them)."""

    target: torch.Tensor
    rows: range | None = None
    columns: range | None = None

    def fill(self, source: Any) -> None:
        """Copy from a safetensors slice, of which only the wanted part is read."""
        rows = slice(None) if self.rows is None else slice(self.rows.start, self.rows.stop)
        columns = self.columns
        self.target.copy_(source[rows] if columns is None else source[rows, columns.start : columns.stop])


class _Blank:
    """Allocates empty parameters of one shard."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.mesh = mesh
        self.dtype = dtype
        self.device = device
        self.places: dict[str, _Place] = {}

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """Return a tensor that every rank holds whole."""
        target = self.empty(size)
        self.places[name] = _Place(target)
        return target

    def vocabulary(self, name: str) -> torch.Tensor:
        """Return this rank's vocabulary rows, padded with zeros to the same number on every rank."""
        shard = VocabularyShard.of(self.spec.vocab_size, self.mesh)
        target = self.empty(shard.width, self.spec.hidden_size)
        target[len(shard.tokens) :].zero_()
        self.places[name] = _Place(target[: len(shard.tokens)], shard.tokens)
        return target

    def column_parallel(self, prefix: str, parts: dict[str, range], has_bias: bool) -> _Matrix:
        """Return several projections of the hidden state as one matrix, each with the given rows of its checkpoint tensor."""
        num_out = sum(len(rows) for rows in parts.values())
        weight, bias = self.empty(num_out, self.spec.hidden_size), self.empty(num_out) if has_bias else None
        start = 0
        for name, rows in parts.items():
            stop = start + len(rows)
            self.places[f"{prefix}{name}.weight"] = _Place(weight[start:stop], rows)
            if bias is not None:
                self.places[f"{prefix}{name}.bias"] = _Place(bias[start:stop], rows)
            start = stop
        return _Matrix(weight, bias)

    def row_parallel(self, name: str, columns: range, has_bias: bool) -> _Matrix:
        """Return a projection back to the hidden state from the given inputs. The bias is added once, by tensor rank 0."""
        weight = self.empty(self.spec.hidden_size, len(columns))
        self.places[f"{name}.weight"] = _Place(weight, columns=columns)
        bias = self.vector(f"{name}.bias", self.spec.hidden_size) if has_bias and self.mesh.tensor_rank == 0 else None
        return _Matrix(weight, bias)


@dataclass(slots=True)
class _Matrix:
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(slots=True)
class _BlankLayer:
    attention_norm: torch.Tensor
    qkv: _Matrix
    qk_norm: torch.Tensor | None
    o: _Matrix
    mlp_norm: torch.Tensor
    gate_up: _Matrix
    down: _Matrix

    def finish(self, fp8: bool) -> LayerWeights:
        def linear(matrix: _Matrix) -> Linear:
            return make_linear(matrix.weight, matrix.bias, fp8)

        return LayerWeights(
            attention_norm_E=self.attention_norm,
            qkv=linear(self.qkv),
            qk_norm_HD=self.qk_norm,
            o=linear(self.o),
            mlp_norm_E=self.mlp_norm,
            gate_up=linear(self.gate_up),
            down=linear(self.down),
        )


def load_decoder(
    folder: Path,
    spec: ModelSpec,
    dtype: str | torch.dtype,
    device: str | torch.device,
    mesh: Mesh | None = None,
    *,
    fp8: bool = False,
) -> Decoder:
    """Return this rank's part of the model on `device`. `dtype` "auto" is the checkpoint's; with `fp8` the layers' matrices are
    rounded to e4m3, embedding and head are not. Raises ModelError before anything is loaded if the files and `spec` do not
    agree, or the mesh does not divide the heads."""
    mesh = mesh or Mesh.single()
    check_mesh(spec, mesh)
    checkpoint = preflight(folder, spec)
    blank = _Blank(spec, mesh, resolve_dtype(dtype, checkpoint), torch.device(device))
    layers = [_blank_layer(blank, layer) for layer in stage_layers(spec, mesh)]
    needs_embedding = mesh.is_first_stage or (spec.tied_embeddings and mesh.is_last_stage)
    embed = blank.vocabulary(EMBEDDING) if needs_embedding else None
    norm = blank.vector("model.norm.weight", spec.hidden_size) if mesh.is_last_stage else None
    head = embed if spec.tied_embeddings else blank.vocabulary(HEAD) if mesh.is_last_stage else None
    _fill(checkpoint, blank)
    layers.reverse()
    weights = DecoderWeights(
        layers=tuple(layers.pop().finish(fp8) for _ in range(len(layers))),
        rotary_P1D=rotary_table(spec, blank.dtype, blank.device),
        embed_VE=embed if mesh.is_first_stage else None,
        final_norm_E=norm,
        head=make_linear(head) if head is not None and mesh.is_last_stage else None,
    )
    return Decoder(spec, mesh, weights)


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype by name, or the checkpoint's for "auto": that of its embedding."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return _STORED[checkpoint.tensors[EMBEDDING].dtype]
    return named_dtype(dtype)


def named_dtype(name: str) -> torch.dtype:
    """Return the dtype of this name in a job or a config. Raises ModelError for another name."""
    if name not in _DTYPES:
        raise ModelError(f"model.dtype: {name!r} is not one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _blank_layer(blank: _Blank, layer: int) -> _BlankLayer:
    spec, mesh, prefix = blank.spec, blank.mesh, layer_prefix(layer)
    heads, of_cache = mesh.shard(spec.num_heads), kv_heads(spec, mesh)
    q_rows, kv_rows = _head_rows(heads, spec.head_dim), _head_rows(of_cache, spec.head_dim)
    qk_norm = None
    if spec.qk_norm:
        qk_norm = blank.empty(len(heads) + len(of_cache), spec.head_dim)
        blank.places[f"{prefix}self_attn.q_norm.weight"] = _Place(qk_norm[: len(heads)])
        blank.places[f"{prefix}self_attn.k_norm.weight"] = _Place(qk_norm[len(heads) :])
    inner = mesh.shard(spec.intermediate_size)
    return _BlankLayer(
        attention_norm=blank.vector(f"{prefix}input_layernorm.weight", spec.hidden_size),
        qkv=blank.column_parallel(
            f"{prefix}self_attn.", {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}, spec.qkv_bias
        ),
        qk_norm=qk_norm,
        o=blank.row_parallel(f"{prefix}self_attn.o_proj", q_rows, spec.o_bias),
        mlp_norm=blank.vector(f"{prefix}post_attention_layernorm.weight", spec.hidden_size),
        gate_up=blank.column_parallel(f"{prefix}mlp.", {"gate_proj": inner, "up_proj": inner}, spec.mlp_bias),
        down=blank.row_parallel(f"{prefix}mlp.down_proj", inner, spec.mlp_bias),
    )


def _head_rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _fill(checkpoint: Checkpoint, blank: _Blank) -> None:
    places, blank.places = blank.places, {}
    for file, names in checkpoint.by_file().items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                place = places.pop(name, None)
                if place is not None:
                    place.fill(tensors.get_slice(name))
    assert not places, f"not filled: {sorted(places)}"
