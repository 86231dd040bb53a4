"""The pieces between matrix products, one pass each, for 16-bit types on a GPU. Imports triton: only `layers` loads this
module, for CUDA tensors. Arithmetic is float32; results are rounded once.

Shape legend: T tokens, E features, H query heads, K key-value heads, D head dimension, F feed-forward size, P page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_BLOCK = 2048
_ROWS, _COLUMNS, _DEPTH, _GROUP = 128, 128, 64, 8
"""Tile of a gated product: tokens, outputs, features read at once, and row blocks that share a block of weights."""
_FP8_MAX = tl.constexpr(448.0)
"""The largest finite e4m3 value."""


@triton.jit
def _gate(gate_up_ptr, out_ptr, size, row_stride, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    gate = tl.load(gate_up_ptr + row * row_stride + offset, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + offset, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * size + offset, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_product(
    x_desc, weight_desc, out_desc, num_tokens, size, features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Tile after tile of both products of the same outputs, side by side. What a block of columns takes of the other product's
    weights beyond `size` falls outside of the output."""
    row_tiles, column_tiles = tl.cdiv(num_tokens, ROWS), tl.cdiv(size, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        first = tile // (GROUP * column_tiles) * GROUP
        height, within = tl.minimum(row_tiles - first, GROUP), tile % (GROUP * column_tiles)
        row, column = (first + within % height) * ROWS, within // height * COLUMNS
        gate, up = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(tl.cdiv(features, DEPTH)):
            x = x_desc.load([row, step * DEPTH])
            gate = tl.dot(x, weight_desc.load([column, step * DEPTH]).T, gate)
            up = tl.dot(x, weight_desc.load([size + column, step * DEPTH]).T, up)
        out_desc.store([row, column], (gate * tl.sigmoid(gate) * up).to(out_desc.dtype))


@triton.jit
def _store_fp8(values, inside, out_ptr, scale_ptr, row, size, offset):
    """Round one row to e4m3 by its own scale, which puts the largest magnitude at e4m3's largest value."""
    largest = tl.max(tl.where(inside, tl.abs(values), 0.0), 0)
    scale = tl.maximum(largest, 1e-12) / _FP8_MAX
    tl.store(out_ptr + row * size + offset, (values / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _gate_fp8(gate_up_ptr, out_ptr, scale_ptr, size, row_stride, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = offset < size
    gate = tl.load(gate_up_ptr + row * row_stride + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + offset, mask=inside, other=0.0).to(tl.float32)
    _store_fp8(gate * tl.sigmoid(gate) * up, inside, out_ptr, scale_ptr, row, size, offset)


@triton.jit
def _norm(
    x_ptr, weight_ptr, out_ptr, scale_ptr, size, eps, HAS_NORM: tl.constexpr, TO_FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: x, or with HAS_NORM x / rms(x) * weight, to the output's dtype, or to e4m3 with the row's scale."""
    row, offset = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = offset < size
    x = tl.load(x_ptr + row * size + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        x = x * tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if TO_FP8:
        _store_fp8(x, inside, out_ptr, scale_ptr, row, size, offset)
    else:
        tl.store(out_ptr + row * size + offset, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normed_halves(first, second, weight_ptr, head, column, inside, eps, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """Both halves of heads divided by their rms and weighted, where the model does so."""
    if HAS_NORM:
        inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
        weight = weight_ptr + head * (2 * HALF) + column
        first = first * inverse * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        second = second * inverse * tl.load(weight + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate_and_store(
    qkv_ptr, angle_ptr, norm_ptr, position_ptr, slot_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    eps, table_stride, page_stride, head_stride, heads, kv_heads,
    HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One token: its query heads turned, its key heads turned into the cache, its value heads copied there."""
    token = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(position_ptr + token), tl.load(slot_ptr + token).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    is_column = column < HALF
    angle = angle_ptr + position.to(tl.int64) * (2 * HALF) + column
    cos = tl.load(angle, mask=is_column, other=0.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=is_column, other=0.0).to(tl.float32)
    row = qkv_ptr + token * (heads + 2 * kv_heads) * (2 * HALF)

    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & is_column
    source = row + head * (2 * HALF) + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    first, second = _normed_halves(first, second, norm_ptr, head, column, inside, eps, HALF, HAS_NORM)
    target = q_ptr + (token * heads + head) * (2 * HALF) + column
    tl.store(target, (first * cos - second * sin).to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(q_ptr.dtype.element_ty), mask=inside)

    page = tl.load(table_ptr + slot * table_stride + position // PAGE).to(tl.int64)
    head = tl.arange(0, KV_HEADS)[:, None]
    inside = (head < kv_heads) & is_column
    place = page * page_stride + head * head_stride + (position % PAGE) * (2 * HALF) + column
    source = row + (heads + head) * (2 * HALF) + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    first, second = _normed_halves(first, second, norm_ptr, heads + head, column, inside, eps, HALF, HAS_NORM)
    tl.store(k_ptr + place, (first * cos - second * sin).to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(k_ptr + place + HALF, (second * cos + first * sin).to(k_ptr.dtype.element_ty), mask=inside)

    source += kv_heads * (2 * HALF)
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(v_ptr + place, first.to(v_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + place + HALF, second.to(v_ptr.dtype.element_ty), mask=inside)


def gate(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, a new contiguous [T, F]."""
    num_tokens, double = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty(num_tokens, double // 2)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(double // 2, _BLOCK))
        _gate[grid](gate_up_T2F, out_TF, double // 2, gate_up_T2F.stride(0), BLOCK=_BLOCK, num_warps=4)
    return out_TF


def gated_product(x_TE: torch.Tensor, weight_2FE: torch.Tensor) -> torch.Tensor:
    """silu(x gate^T) * (x up^T), a new contiguous [T, F], of weights whose first F rows are the gate's. Both sums stay in
    float32 until the end. For Hopper GPUs and later ones; E and F are multiples of 8."""
    num_tokens, features = x_TE.shape
    size = weight_2FE.shape[0] // 2
    out_TF = x_TE.new_empty(num_tokens, size)
    if num_tokens:
        programs = torch.cuda.get_device_properties(x_TE.device).multi_processor_count if x_TE.is_cuda else 2
        x_desc = TensorDescriptor.from_tensor(x_TE, [_ROWS, _DEPTH])
        weight_desc = TensorDescriptor.from_tensor(weight_2FE, [_COLUMNS, _DEPTH])
        out_desc = TensorDescriptor.from_tensor(out_TF, [_ROWS, _COLUMNS])
        _gated_product[(programs,)](
            x_desc, weight_desc, out_desc, num_tokens, size, features,
            ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, GROUP=_GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out_TF


def gate_fp8(gate_up_T2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up as e4m3 [T, F] and the scale of each row [T, 1]: value = e4m3 * scale."""
    num_tokens, double = gate_up_T2F.shape
    size = double // 2
    out_TF, scale_T1 = _fp8_rows(num_tokens, size, gate_up_T2F.device)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _gate_fp8[(num_tokens,)](
            gate_up_T2F, out_TF, scale_T1, size, gate_up_T2F.stride(0), BLOCK=block, num_warps=_row_warps(block)
        )
    return out_TF, scale_T1


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight, a new contiguous [T, E]."""
    num_tokens, size = x_TE.shape
    out_TE = torch.empty_like(x_TE)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _norm[(num_tokens,)](
            x_TE, weight_E, out_TE, None, size, eps,
            HAS_NORM=True, TO_FP8=False, BLOCK=block, num_warps=_row_warps(block),
        )  # fmt: skip
    return out_TE


def to_fp8(x_TE: torch.Tensor, weight_E: torch.Tensor | None = None, eps: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x as e4m3 [T, E] and the scale of each row [T, 1]; with a weight, of x / rms(x) * weight."""
    num_tokens, size = x_TE.shape
    assert x_TE.is_contiguous()
    out_TE, scale_T1 = _fp8_rows(num_tokens, size, x_TE.device)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _norm[(num_tokens,)](
            x_TE, weight_E, out_TE, scale_T1, size, eps,
            HAS_NORM=weight_E is not None, TO_FP8=True, BLOCK=block, num_warps=_row_warps(block),
        )  # fmt: skip
    return out_TE, scale_T1


def rotate_and_store(
    qkv_TX: torch.Tensor,
    rotary_PD: torch.Tensor,
    norm_HD: torch.Tensor | None,
    eps: float,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    table: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    num_heads: int,
    q_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turned queries, contiguous [T, H, D], in `q_THD` where that is given; turned keys and the values go to their places in
    one layer's `cache`.

    `qkv_TX` holds H query, K key and K value heads of D. `rotary_PD` has a row of cosines, then sines, per position;
    `norm_HD` a weight per query, then per key head, where the model normalises them. `cache` is keys and values, each
    [pages, K, P, D] in 16 bits or e4m3; `table` maps [slot, position // P] to a page.
    """
    k_cache, v_cache = cache
    _, kv_heads, page_size, dim = k_cache.shape
    num_tokens = qkv_TX.shape[0]
    q_THD = qkv_TX.new_empty(num_tokens, num_heads, dim) if q_THD is None else q_THD
    if num_tokens:
        assert qkv_TX.is_contiguous() and k_cache.stride() == v_cache.stride() and k_cache.stride(2) == dim
        _rotate_and_store[(num_tokens,)](
            qkv_TX, rotary_PD, norm_HD, position_T, slot_T, table, q_THD, k_cache, v_cache,
            eps, table.stride(0), k_cache.stride(0), k_cache.stride(1), num_heads, kv_heads,
            HALF=dim // 2, HEADS=triton.next_power_of_2(num_heads), KV_HEADS=triton.next_power_of_2(kv_heads),
            COLUMNS=triton.next_power_of_2(dim // 2), PAGE=page_size, HAS_NORM=norm_HD is not None, num_warps=4,
        )  # fmt: skip
    return q_THD


def _fp8_rows(num_tokens: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(num_tokens, size, dtype=torch.float8_e4m3fn, device=device)
    return out, torch.empty(num_tokens, 1, dtype=torch.float32, device=device)


def _row_warps(block: int) -> int:
    return min(16, max(1, block // 512))
