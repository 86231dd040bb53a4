"""The shapes of the models that are measured, as their published config.json give them. Imports no torch.

`tiny` is none of them: it runs the same code on a CPU in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """`family` is the config's model_type, `rope_scaling` its own."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_theta: float
    eps: float
    tied: bool
    rope_scaling: tuple[tuple[str, float | int | str], ...] = ()

    @property
    def qkv(self) -> int:
        """Outputs of the query, key and value products together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def products(self) -> tuple[tuple[str, int, int], ...]:
        """A layer's matrix products: name, input features, output features."""
        return (
            ("qkv", self.hidden, self.qkv),
            ("o", self.heads * self.head_dim, self.hidden),
            ("gate_up", self.hidden, 2 * self.intermediate),
            ("down", self.intermediate, self.hidden),
        )


def _llama3_scaling(factor: float) -> tuple[tuple[str, float | int | str], ...]:
    return (
        ("rope_type", "llama3"),
        ("factor", factor),
        ("low_freq_factor", 1.0),
        ("high_freq_factor", 4.0),
        ("original_max_position_embeddings", 8192),
    )


SHAPES = {
    "llama-3.2-1b": Shape(
        "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, 1e-5, tied=True, rope_scaling=_llama3_scaling(32.0)
    ),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1000000.0, 1e-6, tied=True),
    "llama-3.1-8b": Shape(
        "llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 500000.0, 1e-5, tied=False, rope_scaling=_llama3_scaling(8.0)
    ),
    "llama-3.1-70b": Shape(
        "llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072, 500000.0, 1e-5, tied=False, rope_scaling=_llama3_scaling(8.0)
    ),
    # 48 of 80 layers: 86 GB, more than a device of 80 GB holds.
    "llama-3.1-70b-48": Shape(
        "llama", 48, 8192, 28672, 64, 8, 128, 128256, 131072, 500000.0, 1e-5, tied=False, rope_scaling=_llama3_scaling(8.0)
    ),
    "tiny": Shape("llama", 2, 64, 128, 4, 2, 16, 640, 65536, 10000.0, 1e-5, tied=True),
    "tiny-qwen3": Shape("qwen3", 2, 64, 128, 4, 2, 16, 640, 65536, 10000.0, 1e-6, tied=True),
}
