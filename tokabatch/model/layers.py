"""The pieces of a layer that are not matrix products: normalisation, rotary embedding, gated activation.

Shape legend: T tokens, E hidden size, H heads, D head dimension, F feed-forward size, P positions.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F

from tokabatch.model.spec import ModelSpec, RopeSpec


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight, the mean over the last axis. `weight` is [D], or [H, D] for a weight per head.

    In 16-bit dtypes the mean is taken in float32; on a CPU the quotient is rounded before it is weighted, as transformers
    does, on a GPU one kernel does both and rounds once. float64 stays float64.
    """
    if weight.dim() == 1 and is_fused(x):
        return fused().rms_norm(x, weight, eps)
    if weight.dim() == 1 and x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    if weight.dim() == 1 and x.dtype in (torch.float32, torch.float64):
        # Torch's own kernel writes out the squares before it adds them up, and takes twice as long.
        mean = torch.linalg.vecdot(x, x).div_(x.shape[-1]).unsqueeze(-1)
        return (x * mean.add_(eps).rsqrt_()).mul_(weight)
    return F.rms_norm(x, weight.shape[-1:], None, eps).mul_(weight)


def rotary_frequencies(rope: RopeSpec, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the radians per position of each rotated pair, shape [head_dim / 2].

    Llama 3's scaling: with w the wavelength, the share kept unscaled grows linearly in original_context / w from 0 at
    `low_freq_factor` to 1 at `high_freq_factor`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=dtype) / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.scaling is None:
        return frequency
    scaling = rope.scaling
    turns = scaling.original_context_length * frequency / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequency / scaling.factor + kept * frequency


def rotary_table(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return cosines, then sines, of every position: shape [P, 1, D]. Computed in float64 for float64, else in float32."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = rotary_frequencies(spec.rope, spec.head_dim, exact)
    angle = torch.arange(spec.context_length, dtype=exact)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)[:, None].to(device=device, dtype=dtype)


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate dimension i with dimension i + D/2 by the token's angle, whose cosines and sines are [T, 1, D/2]. Return a new
    contiguous tensor."""
    first, second = x_THD.chunk(2, dim=-1)
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    out_first, out_second = out_THD.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out_THD


def gate(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up. May overwrite the argument; the result may be a view of it."""
    if is_fused(gate_up_T2F):
        return fused().gate(gate_up_T2F)
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF, inplace=True).mul_(up_TF)


def is_fused(x: torch.Tensor) -> bool:
    """Return whether the one-pass kernels of `triton_layers` support this tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def fused() -> ModuleType:
    """Import `triton_layers`: Triton is installed only where there is a GPU."""
    return import_module("tokabatch.model.triton_layers")
