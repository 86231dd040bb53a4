"""`run` and `plan` as Python programs call them.

Like the commands, they refuse a wrong job before torch is imported, which takes seconds. Where a program has imported torch
itself nothing would be gained, and the job is checked as it is prepared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokabatch.errors import UsageError
from tokabatch.job import Job
from tokabatch.job.keywords import refusing_keys

if TYPE_CHECKING:
    from tokabatch.report.plan_report import PlanReport
    from tokabatch.report.progress import Progress
    from tokabatch.report.summary import RunSummary
    from tokabatch.runner.interruption import Interruption
    from tokabatch.runner.member import Cluster
    from tokabatch.runner.shared import Shared

Source = Job | Mapping[str, Any] | str | Path


@refusing_keys(Job.describe_keys, "run({job})")
def run(
    job: Source,
    progress: Progress | bool | None = None,
    should_stop: Callable[[], bool] | Interruption | None = None,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
    repair: bool = False,
    shared: Shared | None = None,
    cluster: Cluster | None = None,
) -> RunSummary:
    """Complete every row of the job's input and write the output folder. If the folder holds a run of this job, continue it.

    `job` may also be what `Job.load` takes: the path of a job file, or a mapping of the same shape. Without `progress`, a
    notebook and a terminal show lines, anything else nothing; with True they show what the command line does, with False
    nothing. `overwrite` deletes an existing run; `retry_errors` runs its error rows again; `repair` computes the contents of
    damaged files again, for which DamageError is raised otherwise.

    `should_stop` is called between steps; an Interruption also interrupts waiting and loading. After a stop, finished samples
    are committed, and the summary has the exit code 130 or that of the Interruption. If the folder cannot be written any more,
    the exit code is 75, or 2 if the previous start ended in the same way and neither committed anything. A stop while the input
    is read raises Stopped (a KeyboardInterrupt) and leaves the folder as it was.

    With `shared`, other processes may write to the folder at the same time, each computing units of the plan. The run ends when
    all units are complete or held by others; samples that those have not committed are pending in the summary. With `cluster`,
    its hosts run the replicas, and this process plans and is the only writer.

    Raises UsageError before any weights are loaded if the job cannot work or the folder holds the run of another job, and
    EngineError if the engine fails.
    """
    begun = time.perf_counter()
    if isinstance(progress, str) and "=" in progress:
        raise UsageError(f"run takes no overrides: write run(Job.load(..., {progress!r}))")
    display = import_module("tokabatch.report.progress").chosen_progress(progress)
    reuse = {"overwrite": overwrite, "retry_errors": retry_errors}
    for name, value in {**reuse, "repair": repair}.items():
        # A text such as "no" would count as true.
        if not isinstance(cast("Any", value), bool):
            raise UsageError(f"{name} is {value!r}; it takes True or False")
    job = _checked(job, shared=shared is not None, **reuse)
    fresh = "torch" not in sys.modules
    runner = import_module("tokabatch.runner.run")
    how = {**reuse, "repair": repair, "shared": shared, "cluster": cluster}
    # A program enters the display that it has made.
    with nullcontext() if display is progress else display:
        return runner.run(job, display, should_stop, seconds_before=time.perf_counter() - begun, fresh=fresh, **how)


@refusing_keys(Job.describe_keys, "plan({job})")
def plan(job: Source, on_rows: Callable[[int, int], None] | None = None) -> PlanReport:
    """Check everything that can be checked without weights, and count rows, samples and tokens. Leaves nothing on disk. `job`
    may also be anything that `Job.load` takes. `on_rows` is called with the numbers of rows and error rows read so far. Raises
    UsageError."""
    job = _checked(job)
    return import_module("tokabatch.runner.plan").plan(job, on_rows)


def _checked(source: Source, **how: bool) -> Job:
    """Return the job. Raises UsageError for what is wrong with it; `how` as `precheck.refuse_early` takes it."""
    job = source if isinstance(source, Job) else Job.load(source)
    if "torch" not in sys.modules:
        import_module("tokabatch.precheck").refuse_early(job, **how)
    return job
