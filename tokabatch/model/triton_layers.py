"""The pieces between matrix products, one pass each, for 16-bit types on a GPU. Imports triton: only `layers` loads this
module, for CUDA tensors. Arithmetic is float32; results are rounded once.

Shape legend: T tokens, H heads, D head dimension, F feed-forward size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _gate(gate_up_ptr, out_ptr, size, row_stride, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    gate = tl.load(gate_up_ptr + row * row_stride + offset, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + offset, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * size + offset, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, row_stride, head_stride, angle_stride, heads,
    HALF: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token: all its heads, the two halves of each turned against one another."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (head < heads) & (column < HALF)
    cos = tl.load(cos_ptr + token * angle_stride + column, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * angle_stride + column, mask=column < HALF, other=0.0).to(tl.float32)
    source = x_ptr + token * row_stride + head * head_stride + column
    first = tl.load(source, mask=inside).to(tl.float32)
    second = tl.load(source + HALF, mask=inside).to(tl.float32)
    target = out_ptr + (token * heads + head) * (2 * HALF) + column
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


def gate(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, a new contiguous [T, F]."""
    num_tokens, double = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty(num_tokens, double // 2)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(double // 2, _BLOCK))
        _gate[grid](gate_up_T2F, out_TF, double // 2, gate_up_T2F.stride(0), BLOCK=_BLOCK, num_warps=4)
    return out_TF


def rotate(x_THD: torch.Tensor, cos_T1C: torch.Tensor, sin_T1C: torch.Tensor) -> torch.Tensor:
    """Turns dimension i with dimension i + D/2; cosines and sines are [T, 1, D/2], of one row stride. A new contiguous
    tensor."""
    num_tokens, heads, dim = x_THD.shape
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    if num_tokens:
        assert cos_T1C.stride(0) == sin_T1C.stride(0) and x_THD.stride(2) == 1
        _rotate[(num_tokens,)](
            x_THD, cos_T1C, sin_T1C, out_THD, x_THD.stride(0), x_THD.stride(1), cos_T1C.stride(0), heads,
            HALF=dim // 2, HEADS=triton.next_power_of_2(heads), COLUMNS=triton.next_power_of_2(dim // 2), num_warps=4,
        )  # fmt: skip
    return out_THD
