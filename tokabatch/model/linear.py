"""Matrix products with fixed weights. Three kinds behind one protocol, chosen once at load: `DenseLinear` anywhere; on the CPU
in float32 `PackedLinear`, which keeps oneDNN's blocked layout (about twice the speed of the plain product where MKL has no
AVX-512 path); and `Fp8Linear`, weights and inputs in e4m3, where a job sets `model.quantization: fp8`.

The input of a product can be made in the form that it takes: `normed_for` and `gated_for` round to e4m3 in the same pass that
normalises or gates.

Shape legend: T tokens, I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from tokabatch.model.layers import fused, gate, is_fused, rms_norm


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows in e4m3, [T, I], each with a scale, [T, 1] float32: x = values * scale."""

    values_TI: torch.Tensor
    scale_T1: torch.Tensor


Input = torch.Tensor | Fp8Rows

MANY_ROWS, FEW_FEATURES = 2048, 2048
"""With so many rows of at most so many features, a product with a gated activation inside takes 3 to 10 % less than cuBLAS
and a pass over its result (H200); at 4,096 features that pass is too small a part."""


class Linear(Protocol):
    """y_TO = x_TI W^T + b."""

    def __call__(self, x_TI: Input) -> torch.Tensor: ...

    def add_to(self, residual_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        """Return residual + x W^T + b. The residual's memory may be reused for the result."""
        ...

    def into(self, y_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        """Write x W^T + b to `y_TO`, and return it."""
        ...


class DenseLinear:
    """Weights as they are, in any dtype on any device."""

    __slots__ = ("bias_O", "weight_OI", "weight_t_IO")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self.weight_OI = weight_OI
        self.weight_t_IO = weight_OI.t()
        self.bias_O = bias_O

    def __call__(self, x_TI: Input) -> torch.Tensor:
        assert isinstance(x_TI, torch.Tensor)
        return F.linear(x_TI, self.weight_OI, self.bias_O)

    def gates_inside(self, x_TI: torch.Tensor) -> bool:
        """Return whether a gated activation inside this product is faster: see `MANY_ROWS`."""
        rows, features = x_TI.shape
        if not is_fused(x_TI) or self.bias_O is not None or rows < MANY_ROWS or features > FEW_FEATURES:
            return False
        # Half of the outputs are the gate's. Tensor descriptors take rows of a multiple of 16 bytes.
        if features % 8 or self.weight_OI.shape[0] % 16:
            return False
        return torch.cuda.get_device_capability(x_TI.device)[0] >= 9

    def add_to(self, residual_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        assert isinstance(x_TI, torch.Tensor)
        residual_TO.addmm_(x_TI, self.weight_t_IO)
        return residual_TO if self.bias_O is None else residual_TO.add_(self.bias_O)

    def into(self, y_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        assert isinstance(x_TI, torch.Tensor)
        torch.mm(x_TI, self.weight_t_IO, out=y_TO)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)


class PackedLinear:
    """Weights in oneDNN's blocked layout, for float32 on the CPU; the residual is added inside the product.

    oneDNN compiles a kernel for each number of rows and keeps a thousand of them, of about half a megabyte. So rows are filled
    up to one of few numbers (`padded_rows`).
    """

    __slots__ = ("bias_O", "num_out", "packed")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self.num_out = weight_OI.shape[0]
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        self.bias_O = bias_O

    def __call__(self, x_TI: Input) -> torch.Tensor:
        assert isinstance(x_TI, torch.Tensor)
        rows = x_TI.shape[0]
        if rows == 0:
            return x_TI.new_empty(0, self.num_out)
        return torch.ops.mkldnn._linear_pointwise(_filled_up(x_TI), self.packed, self.bias_O, "none", [], "")[:rows]

    def add_to(self, residual_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        assert isinstance(x_TI, torch.Tensor)
        rows = x_TI.shape[0]
        if rows == 0:
            return residual_TO
        x_TI, filled_TO = _filled_up(x_TI), _filled_up(residual_TO)
        return torch.ops.mkldnn._linear_pointwise.binary(x_TI, filled_TO, self.packed, self.bias_O, "add")[:rows]

    def into(self, y_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        return y_TO.copy_(self(x_TI))


def padded_rows(rows: int) -> int:
    """Return `rows` rounded up to five significant binary digits: a sixteenth more at most, 16 sizes for each doubling."""
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


def _filled_up(x_TI: torch.Tensor) -> torch.Tensor:
    more = padded_rows(x_TI.shape[0]) - x_TI.shape[0]
    return F.pad(x_TI, (0, 0, 0, more)) if more else x_TI


class Fp8Linear:
    """Weights in e4m3 with a scale per output, inputs rounded to e4m3 with a scale per token, products summed by the tensor
    cores' fast accumulation, which keeps fewer bits than float32.

    The scales put the largest magnitude of each weight row, and of each token, at e4m3's largest value; the scheme is
    the per-channel, per-token one of "FP8 formats for deep learning" (Micikevicius et al. 2022, arXiv:2209.05433) without
    calibration. The hidden state between products keeps the model's dtype.
    """

    __slots__ = ("bias_O", "dtype", "scale_1O", "weight_t_IO")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        rows = fused().to_fp8(weight_OI.contiguous())
        self.dtype = weight_OI.dtype
        self.weight_t_IO, self.scale_1O = rows[0].t(), rows[1].t()
        self.bias_O = bias_O

    def __call__(self, x_TI: Input) -> torch.Tensor:
        x = x_TI if isinstance(x_TI, Fp8Rows) else Fp8Rows(*fused().to_fp8(x_TI.contiguous()))
        y_TO = torch.ops.aten._scaled_mm(
            x.values_TI, self.weight_t_IO, x.scale_T1, self.scale_1O, out_dtype=self.dtype, use_fast_accum=True
        )
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)

    def add_to(self, residual_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        return residual_TO.add_(self(x_TI))

    def into(self, y_TO: torch.Tensor, x_TI: Input) -> torch.Tensor:
        return y_TO.copy_(self(x_TI))


def make_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, fp8: bool = False) -> Linear:
    """Choose the fastest kind for the weight's device and dtype; with `fp8`, on a GPU only, rounded to e4m3."""
    if fp8:
        return Fp8Linear(weight_OI, bias_O)
    packable = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and weight_OI.numel() > 0
    if packable and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return PackedLinear(weight_OI, bias_O)
    return DenseLinear(weight_OI, bias_O)


def normed_for(linear: Linear, x_TI: torch.Tensor, weight_I: torch.Tensor, eps: float) -> Input:
    """Return x / rms(x) * weight in the form that the product takes."""
    if isinstance(linear, Fp8Linear):
        return Fp8Rows(*fused().to_fp8(x_TI, weight_I, eps))
    return rms_norm(x_TI, weight_I, eps)


def gated_for(linear: Linear, gate_up_T2I: torch.Tensor) -> Input:
    """Return silu(gate) * up in the form that the product takes. May overwrite the argument."""
    if isinstance(linear, Fp8Linear):
        return Fp8Rows(*fused().gate_fp8(gate_up_T2I))
    return gate(gate_up_T2I)


def gated_by(gate_up: Linear, linear: Linear, x_TI: Input) -> Input:
    """Return silu(gate) * up, of the product `gate_up` of x, in the form that `linear` takes."""
    if isinstance(gate_up, DenseLinear) and isinstance(x_TI, torch.Tensor) and gate_up.gates_inside(x_TI):
        return fused().gated_product(x_TI, gate_up.weight_OI)
    return gated_for(linear, gate_up(x_TI))
