"""Random weights of real families at sizes that a CPU can run, written once for every engine to load.

The weights mean nothing; their shapes and the arithmetic do. The deviation of the initial weights is larger
than usual, so that greedy outputs depend on the whole context and a wrong mask or position shows in the check.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

COMMON: Mapping[str, Any] = {
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SHAPES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "llama-1m": ("llama", (4096, 128, 512, 4, 4, 2, 32)),
    "llama-10m": ("llama", (8192, 256, 1024, 8, 8, 4, 32)),
    "llama-30m": ("llama", (16384, 384, 1536, 10, 6, 2, 64)),
    "qwen2-20m": ("qwen2", (16384, 384, 1152, 8, 6, 2)),
    "qwen3-25m": ("qwen3", (16384, 384, 1152, 10, 6, 2, 64)),
}
"""By name: the family and its sizes, as far as the family has them."""


def config_of(shape: str) -> PretrainedConfig:
    """transformers' configuration."""
    family, sizes = SHAPES[shape]
    return AutoConfig.for_model(family, **dict(zip(_SIZES, sizes, strict=False)), **COMMON)


def save_random_model(shape: str, folder: Path, dtype: str, seed: int = 0) -> int:
    """Write config and safetensors below `folder`, which every engine loads with the dtype that the config names.
    Weights are drawn in float32, so another dtype holds the same values. Returns the number of parameters."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def vocab_size(shape: str) -> int:
    return SHAPES[shape][1][0]
