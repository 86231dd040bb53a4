"""Matrix products with fixed weights. Two kinds behind one protocol, chosen once at load: `DenseLinear` anywhere, and
on the CPU in float32 `PackedLinear`, which keeps oneDNN's blocked layout (about twice the speed of the plain product
where MKL has no AVX-512 path).

Shape legend: T tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class Linear(Protocol):
    """y_TO = x_TI W^T + b."""

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """residual + x W^T + b. The residual's memory may be reused for the result."""
        ...


class DenseLinear:
    """Weights as they are, in any dtype on any device."""

    __slots__ = ("bias_O", "weight_OI", "weight_t_IO")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self.weight_OI = weight_OI
        self.weight_t_IO = weight_OI.t()
        self.bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        residual_TO.addmm_(x_TI, self.weight_t_IO)
        return residual_TO if self.bias_O is None else residual_TO.add_(self.bias_O)


class PackedLinear:
    """Weights in oneDNN's blocked layout, for float32 on the CPU; the residual is added inside the product.

    oneDNN builds and caches a kernel per number of rows: the first call with a new T costs about 0.3 ms more.
    """

    __slots__ = ("bias_O", "num_out", "packed")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self.num_out = weight_OI.shape[0]
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        self.bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        if x_TI.shape[0] == 0:
            return x_TI.new_empty(0, self.num_out)
        return torch.ops.mkldnn._linear_pointwise(x_TI, self.packed, self.bias_O, "none", [], "")

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        if x_TI.shape[0] == 0:
            return residual_TO
        return torch.ops.mkldnn._linear_pointwise.binary(x_TI, residual_TO, self.packed, self.bias_O, "add")


def make_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Linear:
    """The fastest kind for the weight's device and dtype."""
    packable = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and weight_OI.numel() > 0
    if packable and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return PackedLinear(weight_OI, bias_O)
    return DenseLinear(weight_OI, bias_O)
