"""What an engine driver is: a file in this folder whose name is the engine's key.

A driver has

    Settings                 a frozen dataclass of plain fields with defaults; what can be tuned or pinned
    SWEEP                    a tuple of Axis: which fields tuning tries, in which order, starting from the defaults
    generate(folder, workload, settings) -> Result

`generate` loads the model in `folder` with the dtype its config names, warms up, starts its clock at the first
request and stops it when the last output is finished and on the host. It honours each sample's output length,
ignores end-of-sequence tokens, and samples at the workload's temperature without any other filter (0 is
greedy). It runs in a process of its own. This package knows no torch; a driver imports its engine at the top of
its own file.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from benchmarks.workloads import Workload

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Axis:
    """A field of Settings and the values to try. `ordered` values are climbed: the first that is clearly worse ends
    it."""

    field: str
    values: tuple[Any, ...]
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """`outputs[p * n + s]` is sample s of prompt p. `cpu_seconds` is the process's CPU time while the clock ran.
    `computed_*` count the token positions that went through the model, with padding and finished rows, where
    the driver can know (else None): the rest of them is waste."""

    outputs: tuple[Int32, ...]
    seconds: float
    cpu_seconds: float
    load_seconds: float
    computed_prefill_tokens: int | None = None
    computed_decode_tokens: int | None = None


class Engine(Protocol):
    """A driver's module."""

    Settings: Any
    SWEEP: tuple[Axis, ...]

    def generate(self, folder: Path, workload: Workload, settings: Any) -> Result: ...


def engine_keys() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")))


def load_engine(key: str) -> Engine:
    """Import one driver and with it its engine. Raises ValueError with the known keys."""
    if key not in engine_keys():
        raise ValueError(f"no engine {key!r}; there are {', '.join(engine_keys())}")
    return cast(Engine, importlib.import_module(f"benchmarks.engines.{key}"))


def parse_settings(key: str, kind: Any, texts: Sequence[str]) -> Any:
    """`kind` with the fields that `field=value` texts name, each read as the field's default is typed. Exits where there is
    no such field."""
    return kind(**pinned_settings(key, kind, texts))


def pinned_settings(key: str, kind: Any, texts: Sequence[str]) -> dict[str, Any]:
    """The named fields alone; see `parse_settings`."""
    defaults = {field.name: field.default for field in fields(kind)}
    settings: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in defaults:
            raise SystemExit(f"{key} has no setting {name!r}; it has {', '.join(defaults)}")
        default = defaults[name]
        settings[name] = value.lower() == "true" if isinstance(default, bool) else type(default)(value)
    return settings
