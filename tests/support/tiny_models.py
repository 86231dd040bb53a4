"""Small random models of the supported families, in the files that Hugging Face would hold."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": None,
}


def build(family: str, folder: Path, seed: int = 0, **overrides: object) -> Path:
    """Save a model whose logits are spread enough that greedy choices are not ties, and return its folder."""
    settings = COMMON | overrides
    torch.manual_seed(seed)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**settings)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**settings)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **settings)),
    }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return folder
