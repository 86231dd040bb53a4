"""What a decoder is, as numbers: everything that differs between model families is a field here, never another forward.

Independent of file formats and of torch. A family file fills a `ModelSpec` from a config; `decoder` builds from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's stretched rotary frequencies: wavelengths beyond `original_context_length / low_freq_factor` are slowed
    by `factor`, those below `original_context_length / high_freq_factor` are kept, and between them the two are
    blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding in the half-rotation layout: dimension i turns with dimension i + head_dim / 2."""

    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: pre-norm, rotary grouped-query attention, gated SiLU feed-forward."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeSpec
    context_length: int
    tied_embeddings: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of one layer's tensors."""
    return f"model.layers.{layer}."


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return every tensor that the model needs, with its unsharded shape, under Llama's names and in Llama's order."""
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = {
        "self_attn.q_proj": (q_size, spec.hidden_size, spec.qkv_bias),
        "self_attn.k_proj": (kv_size, spec.hidden_size, spec.qkv_bias),
        "self_attn.v_proj": (kv_size, spec.hidden_size, spec.qkv_bias),
        "self_attn.o_proj": (spec.hidden_size, q_size, spec.o_bias),
        "mlp.gate_proj": (spec.intermediate_size, spec.hidden_size, spec.mlp_bias),
        "mlp.up_proj": (spec.intermediate_size, spec.hidden_size, spec.mlp_bias),
        "mlp.down_proj": (spec.hidden_size, spec.intermediate_size, spec.mlp_bias),
    }
    of_layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (spec.hidden_size,)}
    for name, (num_out, num_in, has_bias) in matrices.items():
        of_layer[f"{name}.weight"] = (num_out, num_in)
        if has_bias:
            of_layer[f"{name}.bias"] = (num_out,)
    if spec.qk_norm:
        of_layer |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    of_layer["post_attention_layernorm.weight"] = (spec.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        shapes |= {layer_prefix(layer) + name: shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tied_embeddings:
        shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes
