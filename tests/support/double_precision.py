"""transformers' models in float64 throughout: as they come, norms and rotary angles are float32 in any type."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_double(folder: Path) -> PreTrainedModel:
    """The model of a folder, without scaled rotary frequencies."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
        elif name.endswith("RotaryEmbedding"):
            module.forward = partial(_rotary, module)
    return model


def _norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return norm.weight * (hidden * (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())


def _rotary(rotary: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = 2 * len(rotary.inv_freq)
    theta = rotary.config.rope_parameters["rope_theta"]
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = position_ids[..., None].double() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()
