"""Which backend serves a model, and what is said where it is the slow one."""

from __future__ import annotations

import pytest
import torch

from tokabatch import attention
from tokabatch.attention import choose_backend

HOPPER, TURING = (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "installed", "obstacle"),
    [
        (torch.bfloat16, 64, HOPPER, True, ""),
        (torch.float16, 128, (8, 0), True, ""),
        (torch.float32, 64, HOPPER, True, "model.dtype bfloat16 or float16, and it is float32"),
        (torch.bfloat16, 80, HOPPER, True, "need heads of 64 or 128 dimensions, and the model's have 80"),
        (torch.bfloat16, 64, TURING, True, "compute capability 8.0, and this one has 7.5"),
        (torch.bfloat16, 64, HOPPER, False, "not installed"),
    ],
)
def test_a_gpu(dtype, head_dim, capability, installed, obstacle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if installed else None)
    name, said = choose_backend("cuda", dtype, head_dim)
    assert name == ("torch_paged" if obstacle else "flashinfer_paged")
    assert obstacle in said and bool(obstacle) == bool(said)


def test_everything_in_the_way_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: TURING)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert choose_backend("cuda", torch.float32, 8)[1].count(";") == 3


def test_a_processor_has_one_backend():
    assert choose_backend("cpu", torch.bfloat16, 64) == ("torch_paged", "")
