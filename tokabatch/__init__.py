"""Offline batch inference for language models: every sample of a dataset, ordered by shared prefix.

`from tokabatch import Job, run`. Importing the package alone loads nothing heavy: the names arrive when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokabatch.job import Job
    from tokabatch.report.summary import PlanReport, RunSummary
    from tokabatch.runner.plan import plan
    from tokabatch.runner.run import run

__version__ = "0.1.0"
__all__ = ["Job", "PlanReport", "RunSummary", "__version__", "plan", "run"]

_HOME = {
    "Job": "tokabatch.job",
    "PlanReport": "tokabatch.report.summary",
    "RunSummary": "tokabatch.report.summary",
    "plan": "tokabatch.runner.plan",
    "run": "tokabatch.runner.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
