"""Llama 2 and 3, and what shares their architecture (SmolLM2, TinyLlama). Defaults are those of transformers'
LlamaConfig."""

from __future__ import annotations

from tokabatch.model.config import ConfigFile, read_rope, refuse_unsupported
from tokabatch.model.spec import ModelSpec


def spec(config: ConfigFile) -> ModelSpec:
    """The model that a config of this family describes."""
    refuse_unsupported(config)
    hidden_size = config.integer("hidden_size", 4096)
    num_heads = config.integer("num_attention_heads", 32)
    attention_bias = config.flag("attention_bias", False)
    return ModelSpec(
        family="llama",
        vocab_size=config.integer("vocab_size", 32_000),
        hidden_size=hidden_size,
        num_layers=config.integer("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=config.integer("head_dim", hidden_size // num_heads),
        intermediate_size=config.integer("intermediate_size", 11_008),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        context_length=config.integer("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
