"""Copies of cache pages, all layers in one launch: thousands of samples may fork in a step, each with a page of its own.

Imports triton: only a GPU backend loads this module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=["source_ptr", "target_ptr"])
def _copy(k_ptr, v_ptr, source_ptr, target_ptr, layer_bytes, page_bytes, num_layers, BLOCK: tl.constexpr):
    """One page of one layer, keys and values."""
    index, layer = tl.program_id(0) // num_layers, (tl.program_id(0) % num_layers).to(tl.int64)
    source = layer * layer_bytes + tl.load(source_ptr + index).to(tl.int64) * page_bytes
    target = layer * layer_bytes + tl.load(target_ptr + index).to(tl.int64) * page_bytes
    for start in range(0, page_bytes, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < page_bytes
        k = tl.load(k_ptr + source + place, mask=inside)
        v = tl.load(v_ptr + source + place, mask=inside)
        tl.store(k_ptr + target + place, k, mask=inside)
        tl.store(v_ptr + target + place, v, mask=inside)


def copy_pages(k_LNKPD: torch.Tensor, v_LNKPD: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Pages `source` over pages `target` (integers, [C] each), of which none occurs twice and none is a source."""
    assert k_LNKPD.is_contiguous() and v_LNKPD.is_contiguous()
    layers, pages = k_LNKPD.shape[:2]
    k, v = (values.view(torch.uint8).view(layers, pages, -1) for values in (k_LNKPD, v_LNKPD))
    if len(source):
        grid = (len(source) * layers,)
        _copy[grid](k, v, source, target, k.stride(0), k.stride(1), layers, BLOCK=_BLOCK, num_warps=4)
