"""The GPU's fused pieces against the same formulas in float32."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import DEVICES, INTERPRETING

from tokabatch.model import layers, linear
from tokabatch.model.linear import MANY_ROWS, DenseLinear, Fp8Linear, Fp8Rows, gated_by, gated_for

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 77])
@pytest.mark.parametrize("size", [48, 2048, 8192, 9728])
def test_gate(device, dtype, tokens, size):
    torch.manual_seed(size)
    x = torch.randn(tokens, 2 * size, device=device).to(dtype)
    expected = torch.nn.functional.silu(x[:, :size].float()) * x[:, size:].float()
    torch.testing.assert_close(layers.fused().gate(x).float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES[INTERPRETING:])
@pytest.mark.parametrize(("tokens", "size", "features"), [(1, 48, 64), (300, 200, 72), (129, 128, 264)])
def test_gated_product(device, dtype, tokens, size, features):
    """Sizes that fill no tile: rows, outputs and features beyond are left out. The interpreter multiplies no bfloat16."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(size)
    x = torch.randn(tokens, features, device=device).to(dtype)
    weight = (torch.randn(2 * size, features, device=device) / features**0.5).to(dtype)
    y = x.float() @ weight.float().t()
    expected = torch.nn.functional.silu(y[:, :size]) * y[:, size:]
    torch.testing.assert_close(layers.fused().gated_product(x, weight).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("outputs", "features", "inside"), [(512, 256, True), (504, 256, False), (512, 252, False)])
def test_a_product_gates_inside_where_descriptors_take_its_sizes(outputs, features, inside, monkeypatch):
    monkeypatch.setattr(linear, "is_fused", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gate_up = DenseLinear(torch.empty(outputs, features, dtype=torch.bfloat16), None)
    assert gate_up.gates_inside(torch.empty(MANY_ROWS, features, dtype=torch.bfloat16)) is inside


@pytest.mark.gpu
@pytest.mark.parametrize(("features", "inside"), [(256, True), (4096, False)])
def test_a_product_gates_inside_where_that_is_faster(features, inside):
    torch.manual_seed(0)
    gate_up = DenseLinear(torch.randn(512, features, device="cuda").bfloat16(), None)
    down = DenseLinear(torch.randn(features, 256, device="cuda").bfloat16(), None)
    x = (torch.randn(MANY_ROWS, features, device="cuda") / features**0.5).bfloat16()
    is_hopper = torch.cuda.get_device_capability()[0] >= 9
    assert gate_up.gates_inside(x) is (inside and is_hopper) and not gate_up.gates_inside(x[1:])
    expected = gated_for(down, gate_up(x))
    torch.testing.assert_close(gated_by(gate_up, down, x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(0, 64), (5, 64), (33, 2048), (9, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(device, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.rand(shape[1:], device=device).to(dtype)
    torch.testing.assert_close(layers.fused().rms_norm(x, weight, 1e-6).float(), exact_norm(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"), [(32, 8, 64, 16), (16, 8, 128, 64), (3, 3, 24, 4), (14, 2, 80, 16)]
)
def test_heads_are_turned_and_stored(device, normed, heads, kv_heads, dim, page):
    torch.manual_seed(dim)
    tokens, pages, columns = 37, 50, 6
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).bfloat16()
    angles = (torch.rand(page * columns, dim, device=device) * 2 - 1).bfloat16()
    norm = torch.rand(heads + kv_heads, dim, device=device).bfloat16() if normed else None
    table = torch.randperm(pages * 6, device=device)[: (tokens + 3) * columns].view(-1, columns).int()
    slot = torch.randperm(tokens + 3, device=device)[:tokens].int()
    position = torch.randint(0, page * columns, (tokens,), device=device).int()
    size = (pages * 6, kv_heads, page, dim)
    k, v = (torch.full(size, 7.0, device=device).bfloat16() for _ in range(2))
    q = layers.fused().rotate_and_store(qkv, angles, norm, 1e-6, position, slot, table, (k, v), heads)

    x = qkv.view(tokens, -1, dim)
    turned = x[:, : heads + kv_heads].float()
    turned = turned if norm is None else exact_norm(turned, norm)
    cos, sin = angles[position.long()].float()[:, None].chunk(2, -1)
    first, second = turned.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    place = table[slot.long(), position.long() // page].long()
    torch.testing.assert_close(q.float(), turned[:, :heads], rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(k[place, :, position.long() % page].float(), turned[:, heads:], rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(v[place, :, position.long() % page], x[:, heads + kv_heads :])
    assert int((k == 7.0).all(-1).sum()) >= (pages * 6 * page - tokens) * kv_heads, "nothing else was written"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 2048, 9728])
def test_e4m3_rows(size):
    """On a GPU alone: the interpreter cuts where the device rounds."""
    torch.manual_seed(size)
    x = torch.randn(19, size, device="cuda").bfloat16() * torch.logspace(-3, 2, 19, device="cuda")[:, None].bfloat16()
    weight = torch.rand(size, device="cuda").bfloat16()
    gate_up = torch.cat((x, x.flip(0)), -1)
    fused = layers.fused()
    for (values, scale), exact in (
        (fused.to_fp8(x), x.float()),
        (fused.to_fp8(x, weight, 1e-6), exact_norm(x, weight)),
        (fused.gate_fp8(gate_up), torch.nn.functional.silu(x.float()) * x.flip(0).float()),
    ):
        assert values.dtype == torch.float8_e4m3fn and scale.shape == (19, 1)
        error = (values.float() * scale - exact).abs()
        # Half a unit in the last of three mantissa bits, or of the smallest step near zero.
        assert (error <= exact.abs() * 2**-4 * 1.02 + scale * 2**-9).all()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_an_e4m3_product_is_as_near_as_its_rounding_allows(bias, tokens):
    torch.manual_seed(tokens)
    weight, x = (torch.randn(rows, 512, device="cuda").bfloat16() for rows in (768, tokens))
    bias_O = torch.randn(768, device="cuda").bfloat16() if bias else None
    linear = Fp8Linear(weight, bias_O)
    exact = x.float() @ weight.float().T + (0 if bias_O is None else bias_O.float())
    for given in (x, Fp8Rows(*layers.fused().to_fp8(x))):
        got = linear(given).float()
        assert got.shape == exact.shape
        if tokens:
            assert (got - exact).norm() / exact.norm() < 0.05
    residual = torch.randn(tokens, 768, device="cuda").bfloat16()
    torch.testing.assert_close(
        linear.add_to(residual.clone(), x).float(), residual.float() + linear(x).float(), rtol=1e-2, atol=0.3
    )


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()
