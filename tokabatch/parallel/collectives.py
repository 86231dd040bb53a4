"""The collectives of a forward pass. On a mesh of one they return their argument or do nothing.

Shape legend: T tokens of a step, E hidden size, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tokabatch.parallel.mesh import Mesh


def all_reduce(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Sums `x` in place over the tensor ranks."""
    if mesh.tensor_size > 1:
        dist.all_reduce(x, group=mesh.tensor_group)
    return x


def all_gather_last(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Concatenates the tensor ranks' `x` (equal shapes) along the last axis."""
    if mesh.tensor_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(mesh.tensor_size)]
    dist.all_gather(parts, x.contiguous(), group=mesh.tensor_group)
    return torch.cat(parts, dim=-1)


def send_hidden(hidden_TE: torch.Tensor, mesh: Mesh) -> None:
    """Hands the hidden states to the same tensor rank of the next pipeline stage."""
    dist.send(hidden_TE.contiguous(), dst=mesh.rank + mesh.tensor_size)


def receive_hidden(hidden_TE: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Fills `hidden_TE` from the previous pipeline stage and returns it."""
    dist.recv(hidden_TE, src=mesh.rank - mesh.tensor_size)
    return hidden_TE
