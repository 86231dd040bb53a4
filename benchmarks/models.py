"""Random weights of real families at sizes that a CPU can run, written once for every engine to load.

The weights mean nothing; their shapes and the arithmetic do. The deviation of the initial weights is larger
than usual, so that greedy outputs depend on the whole context and a wrong mask or position shows in the check.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging


def llama_1m() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        **_COMMON,
    )


def llama_10m() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        **_COMMON,
    )


def llama_30m() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=16384,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        **_COMMON,
    )


def qwen2_20m() -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=16384,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        **_COMMON,
    )


def qwen3_25m() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=16384,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        **_COMMON,
    )


_COMMON = {
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-1m": llama_1m,
    "llama-10m": llama_10m,
    "llama-30m": llama_30m,
    "qwen2-20m": qwen2_20m,
    "qwen3-25m": qwen3_25m,
}


def save_random_model(shape: str, folder: Path, dtype: str, seed: int = 0) -> int:
    """Write config and safetensors below `folder`, which every engine loads with the dtype that the config names.
    Weights are drawn in float32, so another dtype holds the same values. Returns the number of parameters."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def vocab_size(shape: str) -> int:
    return SHAPES[shape]().vocab_size
