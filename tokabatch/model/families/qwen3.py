"""Qwen3 (dense): q and k are normalised per head, and head_dim is its own number. Defaults are those of transformers'
Qwen3Config."""

from __future__ import annotations

from tokabatch.model.config import ConfigFile, read_rope, refuse_sliding_window, refuse_unsupported
from tokabatch.model.spec import ModelSpec


def spec(config: ConfigFile) -> ModelSpec:
    """The model that a config of this family describes."""
    refuse_unsupported(config)
    num_layers = config.integer("num_hidden_layers", 32)
    num_heads = config.integer("num_attention_heads", 32)
    context_length = config.integer("max_position_embeddings", 32_768)
    refuse_sliding_window(config, num_layers, context_length)
    attention_bias = config.flag("attention_bias", False)
    return ModelSpec(
        family="qwen3",
        vocab_size=config.integer("vocab_size", 151_936),
        hidden_size=config.integer("hidden_size", 4096),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads if "num_key_value_heads" in config.values else 32),
        head_dim=config.integer("head_dim", 128),
        intermediate_size=config.integer("intermediate_size", 22_016),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        context_length=context_length,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qk_norm=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )
