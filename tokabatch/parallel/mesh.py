"""The mesh of one worker: tensor ranks are neighbours, pipeline stages lie one tensor group apart.

Independent of models. `Mesh.join` meets the other ranks; `Mesh.create` needs an initialised torch.distributed whose world is
this worker's ranks.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

CHECK = "TOKABATCH_CHECK_RANKS"
"""The environment variable that makes tensor ranks compare every choice of path, for debugging: set it to 1."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank of a worker before it has joined the others. `meeting_file` must not exist before the first of them joins."""

    rank: int
    tensor_size: int
    pipeline_size: int
    meeting_file: Path


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's position. `rank` counts within the worker: pipeline_rank * tensor_size + tensor_rank."""

    rank: int
    tensor_size: int
    pipeline_size: int
    tensor_group: dist.ProcessGroup | None = None
    links: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)
    """With the same tensor rank of the previous stage and of the next one."""
    sending: deque[tuple[dist.Work, torch.Tensor]] = field(default_factory=deque[tuple[dist.Work, torch.Tensor]])
    """Hidden states on their way to the next stage."""
    compares: bool = False
    """See `compare_choice`."""

    @classmethod
    def single(cls) -> Mesh:
        """Return the mesh of one process, without communication."""
        return cls(rank=0, tensor_size=1, pipeline_size=1)

    @classmethod
    def join(cls, place: Place, device: torch.device) -> Mesh:
        """Join the other ranks. On a GPU the rank uses the device of its number, which becomes the current one; on a CPU the
        ranks share the cores."""
        world = place.tensor_size * place.pipeline_size
        if device.type == "cuda":
            # Otherwise symmetric memory would request multicast, which not every host has, and which is not used.
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
            torch.cuda.set_device(place.rank)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // world))
        store = dist.FileStore(str(place.meeting_file), world)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=world)
        return cls.create(place.tensor_size, place.pipeline_size)

    @classmethod
    def create(cls, tensor_size: int, pipeline_size: int) -> Mesh:
        """Return this process's position. Every process of the world must call it, with the same sizes."""
        world, rank = tensor_size * pipeline_size, dist.get_rank()
        assert world == dist.get_world_size(), "the mesh must cover the world"
        own_group: dist.ProcessGroup | None = None
        if tensor_size > 1:
            stages = [list(range(start, start + tensor_size)) for start in range(0, world, tensor_size)]
            found, _ = dist.new_subgroups_by_enumeration(stages)
            own_group = found if isinstance(found, dist.ProcessGroup) else None
        links: dict[int, dist.ProcessGroup | None] = {}
        for first in range(world - tensor_size):
            # A communicator for each pair of neighbours: their messages are never queued behind others.
            group = dist.new_group([first, first + tensor_size])
            links[first] = group if isinstance(group, dist.ProcessGroup) else None
        links_of_rank, compares = (links.get(rank - tensor_size), links.get(rank)), os.environ.get(CHECK, "0") != "0"
        return cls(rank, tensor_size, pipeline_size, own_group, links_of_rank, compares=compares)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def is_single(self) -> bool:
        return self.tensor_size == self.pipeline_size == 1

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def shard(self, size: int) -> range:
        """Return this tensor rank's part of an axis of `size`: equal parts, rounded up, so that the last may be short."""
        part = -(-size // self.tensor_size)
        return range(min(size, self.tensor_rank * part), min(size, (self.tensor_rank + 1) * part))
