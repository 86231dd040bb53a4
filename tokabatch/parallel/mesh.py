"""The mesh of one replica: tensor ranks are neighbours, pipeline stages lie one tensor group apart.

Knows no model. `Mesh.create` needs an initialised torch.distributed whose first tensor x pipeline ranks are this
replica.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this process stands. `rank` counts within the replica: pipeline_rank * tensor_size + tensor_rank."""

    rank: int
    tensor_size: int
    pipeline_size: int
    tensor_group: dist.ProcessGroup | None = None

    @classmethod
    def single(cls) -> Mesh:
        """One process, no communication."""
        return cls(rank=0, tensor_size=1, pipeline_size=1)

    @classmethod
    def create(cls, tensor_size: int, pipeline_size: int) -> Mesh:
        """This process's place. Every process of the world must call it, with the same sizes."""
        assert tensor_size * pipeline_size == dist.get_world_size(), "the mesh must cover the world"
        rank = dist.get_rank()
        own_group: dist.ProcessGroup | None = None
        for stage in range(pipeline_size):
            ranks = list(range(stage * tensor_size, (stage + 1) * tensor_size))
            group = dist.new_group(ranks) if tensor_size > 1 else None
            if rank in ranks and isinstance(group, dist.ProcessGroup):
                own_group = group
        return cls(rank, tensor_size, pipeline_size, own_group)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def stage_layers(self, num_layers: int) -> range:
        """The layers of this process's pipeline stage: contiguous, all stages within one layer of each other."""
        stage, stages = self.pipeline_rank, self.pipeline_size
        return range(num_layers * stage // stages, num_layers * (stage + 1) // stages)

    def shard(self, size: int) -> range:
        """This tensor rank's part of an axis of `size`: equal parts, rounded up, so that the last may be short."""
        part = -(-size // self.tensor_size)
        return range(min(size, self.tensor_rank * part), min(size, (self.tensor_rank + 1) * part))
