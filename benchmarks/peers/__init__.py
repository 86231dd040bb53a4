"""Other engines on the GPU, on the workload files that tokabatch is measured with: one file an engine, its name the key.

A driver has

    Settings                 a frozen dataclass of plain fields with defaults; `--set field=value` changes them
    serve(folder, workload, settings) -> Served

`serve` loads the model in `folder`, runs `warm_up(workload)` once, starts its clock at the first request and stops it when the
last output is finished. It gives every sample its own output length, ignores end-of-sequence tokens and samples at the
workload's temperature without any other filter. Settings are those that did best where these engines were measured. A driver
imports its engine at the top of its own file; this package needs numpy alone, so that it runs in the engine's environment.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from benchmarks.workloads import FIRST_PLAIN_TOKEN, Workload

WARM_UP_SAMPLES = 8192


@dataclass(frozen=True, slots=True)
class Served:
    """What one pass took, and the number of samples and tokens that came out, as the engine counts them."""

    load_seconds: float
    seconds: float
    samples: int
    output_tokens: int


class Peer(Protocol):
    """A driver's module."""

    Settings: Any

    def serve(self, folder: Path, workload: Workload, settings: Any) -> Served: ...


class NotInstalledError(Exception):
    """The engine is not in this Python; the message says what to do."""


def peer_keys() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")))


def load_peer(key: str) -> Peer:
    """Import one driver and with it its engine. Raises ValueError with the known keys, NotInstalledError where the engine is
    missing."""
    if key not in peer_keys():
        raise ValueError(f"no engine {key!r}; there are {', '.join(peer_keys())}")
    try:
        return cast(Peer, importlib.import_module(f"benchmarks.peers.{key}"))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("benchmarks", "tokabatch")):
            raise
        raise NotInstalledError(
            f"{key} cannot run here: this Python has no module {error.name!r}. Run it with the Python of an environment that "
            f"has the engine; besides it the drivers need numpy only."
        ) from error


def warm_up(workload: Workload) -> Workload:
    """The same lengths with other tokens, so that no prefix cache helps the pass that counts; of a large workload a part."""
    part = workload.take(max(1, min(len(workload.prompts), WARM_UP_SAMPLES // workload.n)))
    largest = max(int(prompt.max()) for prompt in workload.prompts)
    span = largest - FIRST_PLAIN_TOKEN + 1
    moved = (FIRST_PLAIN_TOKEN + (prompt - FIRST_PLAIN_TOKEN + span // 2) % span for prompt in part.prompts)
    return replace(part, prompts=tuple(prompt.astype(np.int32) for prompt in moved), seed=workload.seed + 1)
