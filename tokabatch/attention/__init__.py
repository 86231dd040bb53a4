"""Attention over the paged KV cache. A backend is a file here that names its class `Backend`; see `base` for its contract."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from tokabatch.attention.base import AttentionBackend, KVShape


def create_backend(
    name: str, shape: KVShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None
) -> AttentionBackend:
    """The backend of the file `name`, its cache allocated; keys and values have the queries' dtype unless another is given."""
    return import_module(f"tokabatch.attention.{name}").Backend(shape, dtype, device, kv_dtype)


def choose_backend(device: str, dtype: torch.dtype) -> str:
    """FlashInfer's kernels for 16-bit types on a GPU where they are installed, else plain torch."""
    half = dtype in (torch.bfloat16, torch.float16)
    return "flashinfer_paged" if device == "cuda" and half and find_spec("flashinfer") else "torch_paged"
