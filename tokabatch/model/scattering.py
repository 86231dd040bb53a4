"""Tokens scattered over tensor ranks between the products of a layer (sequence parallelism, Korthikanti et al. 2022,
arXiv:2205.05198), where that makes large steps faster: norms and residuals then take a share of the tokens on each rank, and a
product may overlap with the exchange of its tokens (Wang et al. 2023, "Overlap communication with dependent computation via
decomposition").

From which size of a step on, and for which products, is measured when a worker starts: small products lose by it.

Shape legend: T tokens of a step, t those of one rank, I input features, O output features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from tokabatch.model.linear import DenseLinear, Input, Linear
from tokabatch.parallel.collectives import all_gather_first, reduce_scatter_first
from tokabatch.parallel.mesh import Mesh
from tokabatch.parallel.peer_memory import gather_and_multiply, measure_overlap, multiply_and_scatter

SIZES = (4096, 8192, 16_384)
"""Sizes of a step at which it is measured, in tokens; no smaller step has been seen to gain."""
GAIN = 0.98
"""One way is chosen if it takes less than this share of the other's time."""


class LayerProducts(Protocol):
    """The products of a layer."""

    @property
    def qkv(self) -> Linear: ...

    @property
    def o(self) -> Linear: ...

    @property
    def gate_up(self) -> Linear: ...

    @property
    def down(self) -> Linear: ...


@dataclass(frozen=True, slots=True)
class Scattering:
    """`overlapped` names the products that overlap, by the size of a step from which on that holds; steps below the smallest
    are not scattered."""

    mesh: Mesh
    overlapped: Mapping[int, frozenset[str]]

    def products(self, num_tokens: int) -> frozenset[str] | None:
        """Return the products that overlap in a step of this many tokens; None if it is not scattered. Depends on the number
        alone, so that all ranks do the same."""
        size = max((size for size in self.overlapped if size <= num_tokens), default=None)
        return None if size is None else self.overlapped[size]

    def scatter(self, x_TE: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows, a copy; the last rank's are padded with zeros."""
        share = -(-len(x_TE) // self.mesh.tensor_size)
        own = x_TE[self.mesh.tensor_rank * share : (self.mesh.tensor_rank + 1) * share]
        return F.pad(own, (0, 0, 0, share - len(own))) if len(own) < share else own.clone()

    def gather(self, x_tE: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Return all ranks' rows without padding."""
        return all_gather_first(x_tE, self.mesh)[:num_tokens]

    def column(self, linear: Linear, x_tI: torch.Tensor, overlaps: bool) -> torch.Tensor:
        """Return the product of all ranks' rows, padding included: [T, O]."""
        if not overlaps or not isinstance(linear, DenseLinear):
            return linear(all_gather_first(x_tI, self.mesh))
        y_TO = gather_and_multiply(x_tI, linear.weight_t_IO, self.mesh)
        return y_TO if linear.bias_O is None else y_TO.add_(linear.bias_O)

    def row(self, linear: Linear, x: Input, overlaps: bool) -> torch.Tensor:
        """Return this rank's rows of the sum over ranks of the products of all rows, which are padded first: [t, O]."""
        assert isinstance(x, torch.Tensor)
        missing = -len(x) % self.mesh.tensor_size
        x_TI = F.pad(x, (0, 0, 0, missing)) if missing else x
        if not overlaps or not isinstance(linear, DenseLinear) or linear.bias_O is not None:
            return reduce_scatter_first(linear(x_TI), self.mesh)
        return multiply_and_scatter(x_TI, linear.weight_t_IO, self.mesh)


def measure_scattering(layer: LayerProducts, mesh: Mesh, has_row_bias: bool, most_tokens: int) -> Scattering | None:
    """Measure on a model's first layer what scattering gains; None if it gains nothing. Every tensor rank must call it."""
    overlapped: dict[int, frozenset[str]] = {}
    try:
        for size in SIZES:
            if size > most_tokens:
                break
            found, scattered, whole = set[str](), 0.0, 0.0
            for name, is_column in (("qkv", True), ("o", False), ("gate_up", True), ("down", False)):
                linear = getattr(layer, name)
                if not isinstance(linear, DenseLinear):
                    return None
                times = measure_overlap(linear.weight_t_IO, is_column, size, mesh)
                # Only one rank may add a bias.
                may_overlap = is_column or not has_row_bias
                if may_overlap and times.overlapped < GAIN * times.scattered:
                    found.add(name)
                scattered += times.overlapped if name in found else times.scattered
                whole += times.whole
            if scattered < GAIN * whole:
                overlapped[size] = frozenset(found)
    except (RuntimeError, AttributeError) as error:
        logging.getLogger(__name__).warning("products do not overlap with their exchange here: %s", error)
        return None
    return Scattering(mesh, overlapped) if overlapped else None
