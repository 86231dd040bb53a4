"""Attention over the paged KV cache. A backend is a module of this folder with a class `Backend`; `base` is its contract."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from tokabatch.attention.base import AttentionBackend, KVShape

HEAD_DIMS = (64, 128)
"""Head dimensions that `flashinfer_paged` is tested for."""
LEAST_CAPABILITY = (8, 0)
"""The first NVIDIA compute capability with bfloat16."""


def create_backend(
    name: str, shape: KVShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None
) -> AttentionBackend:
    """Return the backend of the module `name`, with its cache allocated in `kv_dtype` (default: `dtype`, that of the
    queries)."""
    return import_module(f"tokabatch.attention.{name}").Backend(shape, dtype, device, kv_dtype)


def choose_backend(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Return the name of a backend, and why it is not FlashInfer: FlashInfer on a GPU if it supports the model, plain torch
    otherwise. The reason is empty if FlashInfer is chosen or the device is not a GPU."""
    if device != "cuda":
        return "torch_paged", ""
    obstacles: list[str] = []
    if dtype not in (torch.bfloat16, torch.float16):
        obstacles.append(f"they need model.dtype bfloat16 or float16, and it is {str(dtype).removeprefix('torch.')}")
    if head_dim not in HEAD_DIMS:
        obstacles.append(f"they need heads of {' or '.join(map(str, HEAD_DIMS))} dimensions, and the model's have {head_dim}")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        needed, found = ("{}.{}".format(*each) for each in (LEAST_CAPABILITY, capability))
        obstacles.append(f"they need a GPU of compute capability {needed}, and this one has {found}")
    if find_spec("flashinfer") is None:
        obstacles.append("they are not installed (`pip install 'tokabatch[gpu]'`)")
    return "torch_paged" if obstacles else "flashinfer_paged", "; ".join(obstacles)
