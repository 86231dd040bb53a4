"""Qwen2 and Qwen2.5: biases on q, k and v. Defaults are those of transformers' Qwen2Config."""

from __future__ import annotations

from tokabatch.model.config import ConfigFile, read_rope, refuse_sliding_window, refuse_unsupported
from tokabatch.model.spec import ModelSpec


def spec(config: ConfigFile) -> ModelSpec:
    """The model that a config of this family describes."""
    refuse_unsupported(config)
    hidden_size = config.integer("hidden_size", 4096)
    num_layers = config.integer("num_hidden_layers", 32)
    num_heads = config.integer("num_attention_heads", 32)
    context_length = config.integer("max_position_embeddings", 32_768)
    refuse_sliding_window(config, num_layers, context_length)
    return ModelSpec(
        family="qwen2",
        vocab_size=config.integer("vocab_size", 151_936),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads if "num_key_value_heads" in config.values else 32),
        head_dim=config.integer("head_dim", hidden_size // num_heads),
        intermediate_size=config.integer("intermediate_size", 22_016),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        context_length=context_length,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=True,
    )
