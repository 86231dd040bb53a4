"""Random models of the families' real shapes, scaled down, saved by transformers; and attention written the plain
way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from transformers import PreTrainedModel

from tokabatch.model.families import family_names

SHAPE = {
    "vocab_size": 397,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
LLAMA3 = {"rope_parameters": LLAMA3_ROPE}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
TIED, BIASED = {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {**LLAMA3, **TIED, "rms_norm_eps": 1e-5}),
    "llama-untied": ("llama", LLAMA3),
    "llama-biased": ("llama", BIASED),
    "qwen2-tied": ("qwen2", {**THETA, **TIED}),
    "qwen3": ("qwen3", {**THETA, "head_dim": 24}),
    **{family: (family, THETA) for family in family_names() if family not in ("llama", "qwen3")},
}
"""Every family, some of them in several ways: the family and what its configuration says beside SHAPE."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `variant` is run with each."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", sorted(VARIANTS))


class NaiveAttend:
    """Causal attention of one sequence over a dense cache without pages, in token order."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        if layer in self.keys:
            k_TKD = torch.cat((self.keys[layer], k_TKD))
            v_TKD = torch.cat((self.values[layer], v_TKD))
        self.keys[layer], self.values[layer] = k_TKD.clone(), v_TKD.clone()
        num_new, num_heads, head_dim = q_THD.shape
        num_known = k_TKD.shape[0]
        k = k_TKD.repeat_interleave(num_heads // k_TKD.shape[1], dim=1)
        v = v_TKD.repeat_interleave(num_heads // v_TKD.shape[1], dim=1)
        scores = torch.einsum("thd,uhd->htu", q_THD, k) / head_dim**0.5
        future = torch.ones(num_new, num_known, dtype=torch.bool).triu(num_known - num_new + 1)
        return torch.einsum("htu,uhd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@pytest.fixture
def naive_attend() -> type[NaiveAttend]:
    return NaiveAttend


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """save_model(name, max_shard_size) -> (folder, model): norms and biases are random too, so that they matter."""

    def save(name: str, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(7)
        family, options = VARIANTS[name]
        model = tiny_models.random_model(family, **SHAPE, **options).eval().requires_grad_(False)
        for key, tensor in model.named_parameters():
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                tensor.normal_(0.0, 0.3)
            else:
                tensor.normal_(0.0, 0.15)
        model.to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder, model

    return save
