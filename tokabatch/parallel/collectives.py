"""The collectives of a forward pass. On a mesh of one they return their argument or do nothing.

Shape legend: T tokens of a step, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tokabatch.errors import EngineError
from tokabatch.parallel.mesh import Mesh

# Their names changed in torch 2.13.
_all_gather: Any = vars(dist).get("all_gather_single") or vars(dist)["all_gather_into_tensor"]
_reduce_scatter: Any = vars(dist).get("reduce_scatter_single") or vars(dist)["reduce_scatter_tensor"]

SENDING = 2
"""Messages with hidden states that a stage may have in flight."""


def all_reduce(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Sum `x` in place over the tensor ranks."""
    if mesh.tensor_size > 1:
        dist.all_reduce(x, group=mesh.tensor_group)
    return x


def all_gather_last(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Concatenate the tensor ranks' `x` (equal shapes) along the last axis."""
    if mesh.tensor_size == 1:
        return x
    rows = all_gather_first(x[None], mesh)
    return rows.movedim(0, -2).reshape(*x.shape[:-1], mesh.tensor_size * x.shape[-1])


def all_gather_first(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Concatenate the tensor ranks' `x` (equal shapes) along the first axis."""
    if mesh.tensor_size == 1:
        return x
    gathered = torch.empty((mesh.tensor_size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    _all_gather(gathered, x.contiguous(), group=mesh.tensor_group)
    return gathered


def reduce_scatter_first(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return this tensor rank's part, along the first axis, of the sum over all of them."""
    if mesh.tensor_size == 1:
        return x
    part = torch.empty((x.shape[0] // mesh.tensor_size, *x.shape[1:]), dtype=x.dtype, device=x.device)
    _reduce_scatter(part, x.contiguous(), group=mesh.tensor_group)
    return part


def least(value: int, mesh: Mesh, device: torch.device, *, of_stage: bool = False) -> int:
    """Return the smallest value of all ranks, or of those of this stage, all of which must call it."""
    if mesh.is_single:
        return value
    smallest = torch.tensor(int(value), device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=mesh.tensor_group if of_stage else None)
    return int(smallest)


def compare_choice(choice: Callable[[], object], mesh: Mesh) -> None:
    """If `Mesh.compares` is set, compare what all tensor ranks of the stage chose to compute next, and raise EngineError if
    they differ. Otherwise different collectives would deadlock."""
    if not mesh.compares or mesh.tensor_size == 1:
        return
    own, all_choices = str(choice()), [""] * mesh.tensor_size
    dist.all_gather_object(all_choices, own, group=mesh.tensor_group)
    for rank, other in enumerate(all_choices):
        if other != all_choices[0]:
            raise EngineError(
                f"tensor ranks 0 and {rank} do not compute the same: {all_choices[0]} and {other}; please report this with the "
                "job file"
            )


def send_hidden(hidden_TE: torch.Tensor, mesh: Mesh) -> None:
    """Send hidden states, which must not be written to again, to the same tensor rank of the next pipeline stage. Returns
    before they are received; at most `SENDING` messages are in flight."""
    if len(mesh.sending) == SENDING:
        mesh.sending.popleft()[0].wait()
    hidden_TE = hidden_TE.contiguous()
    work = dist.isend(hidden_TE, dst=mesh.rank + mesh.tensor_size, group=mesh.links[1])
    assert work is not None
    mesh.sending.append((work, hidden_TE))


def receive_hidden(hidden_TE: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Fill `hidden_TE` from the previous pipeline stage and return it."""
    dist.recv(hidden_TE, src=mesh.rank - mesh.tensor_size, group=mesh.links[0])
    return hidden_TE
