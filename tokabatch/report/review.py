"""Looking back at a run: everything its output folder says, brought together into one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokabatch.errors import OutputError
from tokabatch.job.scalars import write_value
from tokabatch.output.excerpts import error_rows, excerpts
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import Manifest, read_manifest, read_summary
from tokabatch.output.status import read_details
from tokabatch.output.steps import read_steps
from tokabatch.report.closing import PER_CODE
from tokabatch.report.page import RunRecord, render_page
from tokabatch.report.run_estimates import read_estimates, read_estimator
from tokabatch.storage.atomic_files import DurableFiles, write_whole
from tokabatch.storage.listing import consistently

_SAMPLES = 5
"""Of each kind: right, wrong, longest."""
_DTYPES = {8: "(64-bit numbers)", 4: "(32-bit numbers)", 2: "(16-bit numbers)"}


def write_report(out: Path, target: Path | None = None) -> Path:
    """Write the page (OUT/report.html unless `target` says otherwise) and return where it is. Raises OutputError for a folder
    that no run has written to."""
    record = read_record(out)
    target = target or out / "report.html"
    # The folder's name need not be text.
    page = render_page(record).encode(errors="backslashreplace")
    try:
        write_whole(DurableFiles(), target.with_name(f".{target.name}.partial"), target, page)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; give another file with --to") from error
    return target


def read_record(out: Path) -> RunRecord:
    """What the folder holds, as the page wants it."""
    details = read_details(out)
    status = details.status
    if status.state == "absent":
        raise OutputError(f"{out}: no run has written here; give the folder that the job names as output.path")
    folder = OutputFolder(out)
    manifest = read_manifest(folder)
    steps = {
        name: np.asarray(values, np.float64) for name, values in (consistently(lambda: read_steps(folder), out) or {}).items()
    }
    summary = read_summary(folder)
    return RunRecord(
        path=str(out),
        model=manifest.model_path if manifest else "",
        state=status.state,
        samples=status.samples or status.committed,
        ok=status.ok,
        errors=status.errors,
        cancelled=status.cancelled,
        lengths=details.lengths,
        summary=summary,
        steps=steps,
        estimates=read_estimates(out),
        facts=_facts(out, manifest, summary) if manifest else (),
        error_rows=error_rows(out, PER_CODE) if status.errors else None,
        samples_shown=excerpts(out, _SAMPLES, whole=True) if status.ok else {},
    )


def _facts(out: Path, manifest: Manifest, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was: when and where it started, on what, with which settings."""
    job, versions = manifest.job, manifest.versions
    drawn = {} if job.get("mode") == "score" else job.get("generation", {})
    settings = ", ".join(f"{name} {write_value(value)}" for name, value in drawn.items() if value not in (None, [], {}))
    verified, device = job.get("verify") or {}, summary.get("device", "")
    rows = [
        ("started", manifest.started.replace("T", " ")),
        ("model", manifest.model_path),
        ("input", str(job.get("input", {}).get("path", ""))),
        ("settings", settings),
        ("verified by", str(verified.get("kind", ""))),
        ("estimated", read_estimator(out) if verified else ""),
        ("device", " ".join(("CPU" if device == "this processor" else device, _DTYPES.get(summary.get("itemsize", 0), "")))),
        ("versions", f"tokabatch {versions.tokabatch}, torch {versions.torch}, transformers {versions.transformers}, "
         f"Python {versions.python}"),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value.strip()]
