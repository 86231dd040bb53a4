"""What devices reach: the rates that a roofline needs, of those that are known by name and of this machine's processor."""

from __future__ import annotations

from dataclasses import dataclass

from tokabatch.errors import UsageError
from tokabatch.forecast.roofline import H200, DeviceRates

PROCESSOR = "this processor"
_FLOPS_SHARE, _BYTES_SHARE = 790 / 989, 4.3 / 4.8
"""What an H200 was measured to reach of its published dense bf16 and memory rates; taken for devices not measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device whose rates are known. `memory` in bytes; `names` is what CUDA calls it; `measured` where the rates are not
    derived from published ones."""

    rates: DeviceRates
    memory: float
    names: tuple[str, ...] = ()
    measured: bool = False


def _published(name: str, flops: float, bytes_per_second: float, memory: float, *names: str) -> Device:
    return Device(DeviceRates(name, flops * _FLOPS_SHARE, bytes_per_second * _BYTES_SHARE), memory, names)


KNOWN = {
    "h200": Device(H200, 141e9, ("NVIDIA H200",), measured=True),
    "h200-nvl": _published("NVIDIA H200 NVL", 835e12, 4.8e12, 141e9, "NVIDIA H200 NVL"),
    "h100": _published("NVIDIA H100 SXM", 989e12, 3.35e12, 80e9, "NVIDIA H100 80GB HBM3"),
    "h100-nvl": _published("NVIDIA H100 NVL", 835e12, 3.9e12, 94e9, "NVIDIA H100 NVL"),
    "h100-pcie": _published("NVIDIA H100 PCIe", 756e12, 2.0e12, 80e9, "NVIDIA H100 PCIe"),
    "gh200": _published("NVIDIA GH200 96 GB", 989e12, 4.0e12, 96e9, "NVIDIA GH200 480GB"),
    "a100": _published("NVIDIA A100 80 GB", 312e12, 2.04e12, 80e9, "NVIDIA A100-SXM4-80GB"),
    "a100-pcie": _published("NVIDIA A100 80 GB PCIe", 312e12, 1.94e12, 80e9, "NVIDIA A100 80GB PCIe"),
    "a100-40gb": _published("NVIDIA A100 40 GB", 312e12, 1.56e12, 40e9, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    "l40s": _published("NVIDIA L40S", 362e12, 0.864e12, 48e9, "NVIDIA L40S"),
}
"""By the key that the command line takes. Rates and memory are those of NVIDIA's data sheets (dense bf16)."""


def find_device(name: str) -> Device | None:
    """Return the known device that has exactly this `name` in CUDA or in a summary: variants of a name differ in memory and
    rates, and so do slices of a GPU."""
    return next((device for device in KNOWN.values() if name in (*device.names, device.rates.name)), None)


def known_device(key: str) -> Device:
    """Return the device of this key. Raises UsageError for one whose rates are not known."""
    key = key.lower()
    if key not in KNOWN:
        raise UsageError(f"there is no device `{key}` to simulate; write one of {', '.join(KNOWN)}")
    return KNOWN[key]
