"""Sums and products of tensor ranks through memory that the GPUs of a host reach in each other (torch's symmetric memory).

Peer access is all that is needed, no multicast. torch calls these operators alpha: `PeerSums.meet` and `measure_overlap` test
them when a worker starts, and plain collectives are used where they fail or are slower.

Shape legend: T tokens of a step, t those of one rank, I input features, O output features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from tokabatch.parallel.collectives import all_gather_first, all_reduce, least, reduce_scatter_first
from tokabatch.parallel.mesh import Mesh

TRIALS = 5


class PeerSums:
    """Sums over the tensor ranks of what each of them has written into `room`: a rank adds up a share of the rows and writes it
    to all (two-shot). Faster than NCCL up to 64 MB a sum on two H200, and it can be captured in a CUDA graph."""

    def __init__(self, mesh: Mesh, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        assert mesh.tensor_group is not None
        self._group = mesh.tensor_group.group_name
        self._memory = symmetric_memory.empty(rows * columns, dtype=dtype, device=device)
        self._columns = columns
        symmetric_memory.rendezvous(self._memory, self._group)

    @classmethod
    def meet(cls, mesh: Mesh, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> PeerSums | None:
        """Set up sums of up to `rows` rows; None if the ranks have no peer access, or if a sum differs from NCCL's. Every
        tensor rank must call it."""
        first = mesh.rank - mesh.tensor_rank
        if not all_reach(range(first, first + mesh.tensor_size)):
            return None
        sums, works = None, True
        try:
            sums = cls(mesh, rows, columns, dtype, device)
        except (RuntimeError, AttributeError) as error:
            logging.getLogger(__name__).warning("sums through symmetric memory do not work here, NCCL is used: %s", error)
        # Agreed on before the first sum: without another rank's memory it would never end.
        if not least(sums is not None, mesh, device, of_stage=True) or sums is None:
            return None
        trials = [torch.randn(count, columns, device=device).to(dtype) for count in (1, min(rows, 300))]
        # NCCL's sums first, so that a rank whose own sum fails meets the others at `least`.
        all_expected = [all_reduce(given.clone(), mesh).float() for given in trials]
        try:
            for given, expected in zip(trials, all_expected, strict=True):
                found = sums.sum(sums.room(len(given)).copy_(given)).float()
                works = works and bool(((found - expected).abs() <= 0.05 * (1.0 + expected.abs())).all())
        except (RuntimeError, AttributeError) as error:
            logging.getLogger(__name__).warning("sums through symmetric memory fail: %s", error)
            works = False
        if not least(works, mesh, device, of_stage=True):
            logging.getLogger(__name__).warning("sums through symmetric memory fail or differ from NCCL's, which is used")
            return None
        return sums

    def room(self, rows: int) -> torch.Tensor:
        """Return memory of shape [rows, columns] to write into. What was summed there before is overwritten."""
        return self._memory[: rows * self._columns].view(rows, self._columns)

    def holds(self, rows: int) -> bool:
        """Return whether there is room for this many rows, at least one."""
        return 0 < rows * self._columns <= len(self._memory)

    def sum(self, room: torch.Tensor) -> torch.Tensor:
        """Sum the memory over ranks in place and return it; valid until the next `room` is written."""
        torch.ops.symm_mem.two_shot_all_reduce_(room, "sum", self._group)
        return room


def gather_and_multiply(x_tI: torch.Tensor, weight_t_IO: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return all ranks' x, one below the other, times W: [T, O]. A rank's part is multiplied while the next one is fetched."""
    group = mesh.tensor_group and mesh.tensor_group.group_name
    _, products = torch.ops.symm_mem.fused_all_gather_matmul(x_tI, [weight_t_IO], 0, group, return_A=False)
    return products[0]


def multiply_and_scatter(x_TI: torch.Tensor, weight_t_IO: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return this rank's rows of the sum over ranks of x W: [t, O]. A part is sent while the next one is multiplied."""
    group = mesh.tensor_group and mesh.tensor_group.group_name
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x_TI, weight_t_IO, "sum", 0, group)


@dataclass(frozen=True, slots=True)
class OverlapTimes:
    """Milliseconds that a product of a layer takes on the slowest rank: overlapped with the exchange of its tokens, before or
    after that exchange, and with tokens that every rank has, including the sum if there is one."""

    overlapped: float
    scattered: float
    whole: float


def measure_overlap(weight_t_IO: torch.Tensor, is_column: bool, num_tokens: int, mesh: Mesh) -> OverlapTimes:
    """Measure a product of a step of so many tokens, a multiple of the ranks. Every tensor rank must call it and gets the same
    result. Raises RuntimeError if the overlapped product fails or differs."""
    device, dtype = weight_t_IO.device, weight_t_IO.dtype
    x_TI = torch.randn(num_tokens, weight_t_IO.shape[0], device=device).to(dtype)
    if is_column:
        x_tI = x_TI[: num_tokens // mesh.tensor_size].contiguous()
        ways = (
            lambda: gather_and_multiply(x_tI, weight_t_IO, mesh),
            lambda: all_gather_first(x_tI, mesh) @ weight_t_IO,
            lambda: x_TI @ weight_t_IO,
        )
    else:
        ways = (
            lambda: multiply_and_scatter(x_TI, weight_t_IO, mesh),
            lambda: reduce_scatter_first(x_TI @ weight_t_IO, mesh),
            lambda: all_reduce(x_TI @ weight_t_IO, mesh),
        )
    expected = ways[1]().float()
    error = float((ways[0]().float() - expected).abs().max() / expected.abs().max())
    if not least(error < 0.05, mesh, device, of_stage=True):
        raise RuntimeError(f"an overlapped product differs from the plain one by {error:.3f} of its largest value")
    return OverlapTimes(*(_slowest(work, mesh, device) for work in ways))


def _slowest(work: Callable[[], torch.Tensor], mesh: Mesh, device: torch.device) -> float:
    """Return the milliseconds that some work takes on the slowest rank."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(TRIALS):
        work()
    end.record()
    end.synchronize()
    elapsed = torch.tensor(begin.elapsed_time(end) / TRIALS, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=mesh.tensor_group)
    return float(elapsed)


def all_reach(ranks: range) -> bool:
    """Return whether the GPUs of these ranks have peer access to each other: a fact of the host, on which all ranks agree."""
    return all(torch.cuda.can_device_access_peer(a, b) for a in ranks for b in ranks if a != b)
