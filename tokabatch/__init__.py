"""Offline batch inference for language models: every sample of a dataset, ordered by shared prefix.

`from tokabatch import run; summary = run("job.yaml")`; a mapping or a `Job` will do, too. Importing the package alone loads
nothing heavy: the names arrive when first asked for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokabatch.api import plan, run
    from tokabatch.errors import (
        DamageError,
        EngineError,
        InputError,
        JobError,
        ModelError,
        OutputError,
        Stopped,
        TokabatchError,
        UsageError,
    )
    from tokabatch.job import Job
    from tokabatch.report.plan_report import PlanReport
    from tokabatch.report.progress import Progress, ProgressSnapshot
    from tokabatch.report.summary import RunSummary

# Read by OpenMP once, when torch is loaded. Its threads would spin until the slowest of them has its turn: beside other busy
# processes, most of the time. Without spinning at all, products that take microseconds wait for threads to wake up.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
__all__ = [
    "DamageError",
    "EngineError",
    "InputError",
    "Job",
    "JobError",
    "ModelError",
    "OutputError",
    "PlanReport",
    "Progress",
    "ProgressSnapshot",
    "RunSummary",
    "Stopped",
    "TokabatchError",
    "UsageError",
    "__version__",
    "plan",
    "run",
]

_HOME = {
    "Job": "tokabatch.job",
    "PlanReport": "tokabatch.report.plan_report",
    "Progress": "tokabatch.report.progress",
    "ProgressSnapshot": "tokabatch.report.progress",
    "RunSummary": "tokabatch.report.summary",
    **dict.fromkeys(("plan", "run"), "tokabatch.api"),
    **dict.fromkeys(("DamageError", "EngineError", "InputError", "JobError", "ModelError"), "tokabatch.errors"),
    **dict.fromkeys(("OutputError", "Stopped", "TokabatchError", "UsageError"), "tokabatch.errors"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
