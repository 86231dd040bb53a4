"""The GPU's fused pieces against the same formulas in float32."""

from __future__ import annotations

import pytest
import torch

from tokabatch.model import layers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 77])
@pytest.mark.parametrize("size", [48, 2048, 8192, 9728])
def test_gate(dtype, tokens, size):
    torch.manual_seed(size)
    x = torch.randn(tokens, 2 * size, device="cuda").to(dtype)
    expected = torch.nn.functional.silu(x[:, :size].float()) * x[:, size:].float()
    torch.testing.assert_close(layers.gate(x).float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [(40, 64), (24, 128), (3, 24), (1, 80)])
def test_rotate(dtype, heads, dim):
    torch.manual_seed(dim)
    tokens = 33
    x = torch.randn(tokens, heads + 5, dim, device="cuda").to(dtype)[:, :heads]
    angle = torch.rand(tokens, 1, dim // 2, device="cuda") * 6
    cos, sin = torch.cat((angle.cos(), angle.sin()), -1).to(dtype).chunk(2, -1)
    first, second = x.float().chunk(2, -1)
    expected = torch.cat((first * cos.float() - second * sin.float(), second * cos.float() + first * sin.float()), -1)
    torch.testing.assert_close(layers.rotate(x, cos, sin).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(5, 64), (7, 3, 24)])
def test_rms_norm(shape):
    x = torch.randn(shape, device="cuda").bfloat16()
    weight = torch.rand(shape[1:], device="cuda").bfloat16()
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()
    torch.testing.assert_close(layers.rms_norm(x, weight, 1e-6).float(), exact, rtol=2e-2, atol=2e-2)
