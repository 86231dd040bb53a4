"""Asynchronous copies of host arrays to a device, through pinned memory and in stream order.

A copy from pageable memory blocks the host until the device has finished all earlier work, and each copy costs a launch: all
arrays of a step are therefore sent in one copy.
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
    """Collects arrays from several callers, sends them in one copy and then runs the work that uses them on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[tuple[npt.NDArray[Any], Parcel]] = []
        self._work: list[Callable[[], None]] = []

    def add(self, values: npt.NDArray[Any]) -> Parcel:
        """Register an array to be sent. Its parcel holds a device tensor of the same type and shape once `send` has
        returned."""
        parcel = Parcel()
        self._waiting.append((np.ascontiguousarray(values), parcel))
        return parcel

    def once_sent(self, work: Callable[[], None]) -> None:
        """Register a function to be called at the end of `send`, in order of registration."""
        self._work.append(work)

    def send(self) -> None:
        """Start the copy and the registered work, without blocking. Later work of the stream finds the values in place."""
        tensors = to_device_all([values for values, _ in self._waiting], self._device)
        for (_, parcel), tensor in zip(self._waiting, tensors, strict=True):
            parcel.deliver(tensor)
        for work in self._work:
            work()
        self._waiting, self._work = [], []


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the values as a tensor on the device; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_device_all(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Return each array as a tensor of its type and shape on the device, all sent in one copy; on a CPU they share the arrays'
    memory."""
    if device.type == "cpu":
        return [torch.from_numpy(values) for values in arrays]
    starts = _starts(arrays)
    pinned = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    _lay_out(arrays, starts, pinned.numpy())
    return _views(arrays, starts, pinned.to(device, non_blocking=True))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start a copy to the host and return its target. The values are valid once an event that is recorded after this call has
    completed."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _starts(arrays: Sequence[npt.NDArray[Any]]) -> list[int]:
    """Return the aligned offset in bytes of each array in the buffer, followed by the buffer's size."""
    return list(accumulate((-(-values.nbytes // _ALIGNMENT) * _ALIGNMENT for values in arrays), initial=0))


def _lay_out(arrays: Sequence[npt.NDArray[Any]], starts: list[int], buffer: npt.NDArray[np.uint8]) -> None:
    for values, start in zip(arrays, starts[:-1], strict=True):
        buffer[start : start + values.nbytes].view(values.dtype)[:] = values.reshape(-1)


def _views(arrays: Sequence[npt.NDArray[Any]], starts: list[int], buffer: torch.Tensor) -> list[torch.Tensor]:
    return [
        buffer[start : start + values.nbytes].view(torch.from_numpy(values[:0]).dtype).view(values.shape)
        for values, start in zip(arrays, starts[:-1], strict=True)
    ]
