"""Devices are identified by the exact names that CUDA gives them."""

from __future__ import annotations

import pytest
import torch

from tokabatch.forecast import processor
from tokabatch.forecast.devices import KNOWN, find_device
from tokabatch.forecast.processor import measure_processor


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GH200 144G HBM3e", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("", None),
    ],
)
def test_a_variant_is_not_taken_for_another(name: str, key: str | None) -> None:
    assert find_device(name) == (None if key is None else KNOWN[key])


def test_what_a_summary_notes_is_found_again() -> None:
    assert all(find_device(device.rates.name) == device for device in KNOWN.values())


def test_every_name_is_of_one_device() -> None:
    names = [name for device in KNOWN.values() for name in {*device.names, device.rates.name}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("cores", [8, 2])
def test_a_processor_is_as_fast_as_its_threads_together_on_the_cores_it_may_use(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "usable_cores", lambda: cores)
    before = torch.get_num_threads()
    measured: list[float] = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            measured.append(measure_processor(0.0).rates.flops)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    # Also where other work runs on the same cores.
    assert min(4, cores) / 2 < measured[1] / measured[0] < min(4, cores) * 1.5
