"""transformers continuous batching (`generate_batch`), by the driver that serves the comparison on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.engines import transformers_batch
from benchmarks.peers import Served
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Settings:
    max_requests: int = 256
    max_batch_tokens: int = 8192
    page_size: int = 32
    device: Literal["auto", "cpu", "cuda"] = "auto"


def serve(folder: Path, workload: Workload, settings: Settings) -> Served:
    """Warms up with three tokens of four samples, as that driver does: a whole pass would take minutes."""
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    result = transformers_batch.generate(
        folder,
        workload,
        transformers_batch.Settings(
            max_requests=settings.max_requests,
            max_batch_tokens=settings.max_batch_tokens,
            page_size=settings.page_size,
            device=device,
        ),
    )
    return Served(result.load_seconds, result.seconds, len(result.outputs), sum(len(output) for output in result.outputs))
