"""Host arrays to a device without waiting for it: through pinned memory, in the order of the stream.

A copy from pageable memory makes the host wait until the device has finished all earlier work, and a step sends twenty.
"""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of the values; on a CPU it shares their memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor that holds the values once the stream has come this far: wait for an event recorded behind this call."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
