"""The part of a model that a rank holds: its query and key-value heads, its layers, its part of the vocabulary.

Sizing, weights, attention and the sampler all use these functions. A `Mesh(rank, tensor, pipeline)` without processes suffices.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokabatch.errors import ModelError
from tokabatch.model.spec import ModelSpec
from tokabatch.number_text import counted
from tokabatch.parallel.mesh import Mesh

PART = 128
"""Logits that the sampler sums up together: none of its parts lies on two ranks."""


def check_mesh(spec: ModelSpec, mesh: Mesh) -> None:
    """Raise ModelError if the mesh does not divide the model."""
    ranks, heads, kv = mesh.tensor_size, spec.num_heads, spec.num_kv_heads
    if heads % ranks:
        possible = [count for count in range(1, heads + 1) if heads % count == 0 and not (kv % count and count % kv)]
        raise ModelError(
            f"num_attention_heads ({heads}) is not a multiple of {counted(ranks, 'tensor rank')}; write one of "
            f"{', '.join(map(str, possible))} as engine.tensor"
        )
    if kv % ranks and ranks % kv:
        raise ModelError(
            f"num_key_value_heads ({kv}) and {counted(ranks, 'tensor rank')} do not divide one another; write a divisor or a "
            f"multiple of {kv} as engine.tensor"
        )
    if spec.num_layers < mesh.pipeline_size:
        raise ModelError(
            f"{counted(spec.num_layers, 'layer')} cannot fill {counted(mesh.pipeline_size, 'pipeline stage')}; write at most "
            f"{spec.num_layers} as engine.pipeline"
        )


def kv_heads(spec: ModelSpec, mesh: Mesh) -> range:
    """Return the key-value heads of this tensor rank. If there are fewer of them than ranks, neighbours hold the same one."""
    copies = max(1, mesh.tensor_size // spec.num_kv_heads)
    if copies == 1:
        return mesh.shard(spec.num_kv_heads)
    return range(mesh.tensor_rank // copies, mesh.tensor_rank // copies + 1)


def stage_layers(spec: ModelSpec, mesh: Mesh) -> range:
    """Return the layers of this process's pipeline stage, contiguous, such that the slowest stage takes as little time as
    possible. The cost of layers, and of the head in the last stage, is that of their products for a token; looking up an
    embedding costs nothing."""
    stages, layers = mesh.pipeline_size, spec.num_layers
    if stages == 1:
        return range(layers)
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    head = spec.vocab_size / (heads + 3 * spec.intermediate_size)
    before = stages - 1
    in_last = min(range(1, layers - before + 1), key=lambda count: (max(-(-(layers - count) // before), count + head), -count))
    if mesh.is_last_stage:
        return range(layers - in_last, layers)
    stage, others = mesh.pipeline_rank, layers - in_last
    return range(others * stage // before, others * (stage + 1) // before)


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """This tensor rank's tokens of a vocabulary. Its embedding, head and logits are padded to `width`, the same on every rank;
    side by side they are the vocabulary, followed by all padding."""

    mesh: Mesh
    vocab_size: int
    tokens: range
    width: int

    @classmethod
    def of(cls, vocab_size: int, mesh: Mesh) -> VocabularyShard:
        """Return this rank's shard, of whole parts; on a mesh of one tensor rank nothing is padded."""
        if mesh.tensor_size == 1:
            return cls(mesh, vocab_size, range(vocab_size), vocab_size)
        width = PART * -(-vocab_size // (PART * mesh.tensor_size))
        first = min(vocab_size, mesh.tensor_rank * width)
        return cls(mesh, vocab_size, range(first, min(vocab_size, first + width)), width)
