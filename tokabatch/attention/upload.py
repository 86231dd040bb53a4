"""Host arrays to a device without waiting for it: through pinned memory, in the order of the stream.

A copy from pageable memory makes the host wait until the device has finished all earlier work, and each copy costs a launch:
what a step sends goes together, in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16


class Parcel:
    """An array in transit: `tensor` is valid once the outbox has been sent."""

    __slots__ = ("_tensor",)

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        assert self._tensor is not None, "the outbox has not been sent"
        return self._tensor

    def deliver(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor


class Outbox:
    """Collects arrays of several makers and sends them together, then does the work that needs them on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[tuple[npt.NDArray[Any], Parcel]] = []
        self._work: list[Callable[[], None]] = []

    def add(self, values: npt.NDArray[Any]) -> Parcel:
        """Register an array: it is on the device, with its type and shape, when `send` returns."""
        parcel = Parcel()
        self._waiting.append((np.ascontiguousarray(values), parcel))
        return parcel

    def once_sent(self, work: Callable[[], None]) -> None:
        """Call this function at the end of `send`, in the order of registration."""
        self._work.append(work)

    def send(self) -> None:
        """Start the copy, and the work that follows it. The stream's later work sees the values; the host does not wait."""
        tensors = to_device_all([values for values, _ in self._waiting], self._device)
        for (_, parcel), tensor in zip(self._waiting, tensors, strict=True):
            parcel.deliver(tensor)
        for work in self._work:
            work()
        self._waiting, self._work = [], []


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return a tensor of the values; on a CPU it shares their memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_device_all(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Return a tensor of each array, of its type and shape, all transferred in one copy; on a CPU they share the arrays'
    memory."""
    if device.type == "cpu":
        return [torch.from_numpy(values) for values in arrays]
    starts = _starts(arrays)
    pinned = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    _lay_out(arrays, starts, pinned.numpy())
    return _views(arrays, starts, pinned.to(device, non_blocking=True))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor that holds the values once the stream has come this far: wait for an event recorded after this
    call."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _starts(arrays: Sequence[npt.NDArray[Any]]) -> list[int]:
    """Return where in the buffer each array begins, in bytes, aligned, followed by the buffer's size."""
    return list(accumulate((-(-values.nbytes // _ALIGNMENT) * _ALIGNMENT for values in arrays), initial=0))


def _lay_out(arrays: Sequence[npt.NDArray[Any]], starts: list[int], buffer: npt.NDArray[np.uint8]) -> None:
    for values, start in zip(arrays, starts[:-1], strict=True):
        buffer[start : start + values.nbytes].view(values.dtype)[:] = values.reshape(-1)


def _views(arrays: Sequence[npt.NDArray[Any]], starts: list[int], buffer: torch.Tensor) -> list[torch.Tensor]:
    return [
        buffer[start : start + values.nbytes].view(torch.from_numpy(values[:0]).dtype).view(values.shape)
        for values, start in zip(arrays, starts[:-1], strict=True)
    ]
