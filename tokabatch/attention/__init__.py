"""Attention over the paged KV cache. A backend is a file here that names its class `Backend`; see `base` for its contract."""

from __future__ import annotations

from importlib import import_module

import torch

from tokabatch.attention.base import AttentionBackend, KVShape


def create_backend(name: str, shape: KVShape, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The backend of the file `name`, its cache allocated."""
    return import_module(f"tokabatch.attention.{name}").Backend(shape, dtype, device)
