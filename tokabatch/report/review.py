"""Looking back at a run: everything its output folder says, brought together into one page."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from tokabatch.errors import OutputError, TokabatchError
from tokabatch.input.prompts.columns import DEFAULTS
from tokabatch.input.prompts.rebuild import Rebuilt, job_as_run, rebuild_prompts
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.job import GenerationConfig
from tokabatch.job.scalars import write_value
from tokabatch.number_text import counted
from tokabatch.output.excerpts import Excerpt, error_rows, excerpts, finish_reasons
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.manifest import Manifest, read_manifest, read_summary
from tokabatch.output.shards import read_groups
from tokabatch.output.status import read_details
from tokabatch.output.steps import read_steps
from tokabatch.report.closing import PER_CODE
from tokabatch.report.page import PAGE_START, render_page
from tokabatch.report.run_estimates import Findings, read_estimator, read_findings
from tokabatch.report.run_record import HardRow, PerToken, RunRecord
from tokabatch.scoring.estimates import Estimate, right_from
from tokabatch.scoring.expected import expected_answers
from tokabatch.storage.atomic_files import DurableFiles, write_whole
from tokabatch.storage.listing import consistently, read_bytes

_SAMPLES = 5
"""Of each kind: right, wrong, longest."""
_HARDEST = 30
"""Rows, of which most are folded."""
_DTYPES = {8: "(64-bit numbers)", 4: "(32-bit numbers)", 2: "(16-bit numbers)"}


def write_report(out: Path, target: Path | None = None) -> Path:
    """Write the page (OUT/report.html unless `target` says otherwise) and return where it is. Raises OutputError for a folder
    that no run has written to, and where OUT/report.html is not a page of this command, unless it is given as `target`."""
    if target is None:
        target = out / "report.html"
        content = read_bytes(DurableFiles(), target)
        if content is not None and not content.startswith(PAGE_START.encode()):
            raise OutputError(f"{target} is not a page that this command wrote, and is kept; give another file with --to")
    record = read_record(out)
    # The folder's name need not be text.
    page = render_page(record).encode(errors="backslashreplace")
    try:
        write_whole(DurableFiles(), target.with_name(f".{target.name}.partial"), target, page)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; give another file with --to") from error
    return target


def read_record(out: Path) -> RunRecord:
    """Return what the page shows of the folder."""
    details = read_details(out)
    status = details.status
    if status.state == "absent":
        raise OutputError(f"{out}: no run has written here; give the folder that the job names as output.path")
    folder = OutputFolder(out)
    manifest = read_manifest(folder)
    steps = {
        name: np.asarray(values, np.float64) for name, values in (consistently(lambda: read_steps(folder), out) or {}).items()
    }
    summary, findings = read_summary(folder), read_findings(folder, _HARDEST)
    estimates, verify = findings.estimates, (manifest and manifest.job.get("verify")) or {}
    shown = excerpts(out, _SAMPLES, whole=True) if status.ok else {}
    rows = [*(each for kind in shown.values() for each in kind), *(sample for _, sample, _ in findings.hardest)]
    rebuilt, obstacle = _prompts(folder, manifest, rows) if manifest and shown else (Rebuilt(), "")
    return RunRecord(
        shared=bool(manifest and manifest.units),
        name=out.resolve().name or str(out),
        model=manifest.model_path if manifest else "",
        state=status.state,
        samples=status.samples or status.committed,
        ok=status.ok,
        errors=status.errors,
        cancelled=status.cancelled,
        lengths=details.lengths,
        summary=summary,
        steps=steps,
        estimates=estimates,
        facts=_facts(out, manifest, summary.get("this_start", summary), estimates or (), rebuilt.chat_template, obstacle, rows)
        if manifest
        else (),
        error_rows=error_rows(out, PER_CODE) if status.errors else None,
        samples_shown=shown,
        prompts=rebuilt.prompts,
        right=status.correct,
        without_verdict=status.without_verdict or 0,
        unjudged=(status.unjudged or 0) + (status.of_another_judge or 0),
        cut_off=finish_reasons(folder)["length"] if status.ok else 0,
        verify=verify,
        row_counts=findings.row_counts,
        hardest=_hard_rows(findings, verify),
        per_token=_per_token(folder, manifest) if manifest and manifest.job.get("mode") == "score" else None,
    )


def _per_token(folder: OutputFolder, manifest: Manifest) -> PerToken:
    """The log-probabilities of the texts that were scored."""
    tables = [
        table.filter(pc.call_function("equal", [table["status"], "ok"]))
        for shard in recorded_shards(folder, manifest)
        for table in read_groups(shard, ("status", "cumulative_logprob", "num_output_tokens"))
    ]
    sums = np.concatenate([np.zeros(0), *(table["cumulative_logprob"].to_numpy() for table in tables)])
    tokens = np.concatenate([np.zeros(0), *(table["num_output_tokens"].to_numpy() for table in tables)])
    return PerToken(sums / np.maximum(tokens, 1), float(sums.sum() / max(tokens.sum(), 1)))


def _hard_rows(findings: Findings, verify: Mapping[str, Any]) -> tuple[HardRow, ...]:
    counts = findings.row_counts
    if counts is None:
        return ()
    return tuple(
        HardRow(
            sample.row_index,
            None if sample.id == str(sample.row_index) else sample.id,
            int(counts.right[place]),
            int(counts.samples[place]),
            str(sample.judged["extracted"]) if answered and "extracted" in sample.judged else None,
            answered,
            " or ".join(expected_answers(verify, sample.columns)),
        )
        for place, sample, answered in findings.hardest
    )


def _prompts(folder: OutputFolder, manifest: Manifest, shown: Sequence[Excerpt]) -> tuple[Rebuilt, str]:
    """The prompts of the rows that are shown, made again of the columns in the output; or why there are none."""
    rows = {each.row_index: each.columns for each in shown}
    digests = RowDigests.read(folder.row_digests)
    if digests is None:
        return Rebuilt(), "not shown: the folder holds no digests to compare them with"
    try:
        job = job_as_run(manifest.job, manifest.working_folder, manifest.model_path)
        return rebuild_prompts(job, rows, digests, datetime.fromisoformat(manifest.started).replace(tzinfo=None)), ""
    except TokabatchError as error:
        return Rebuilt(), f"not shown: {error}"


def _prompt_facts(prompt: Mapping[str, Any], chat_template: str, columns: Collection[str]) -> list[tuple[str, str]]:
    """How prompts were made: the job's section, the chat template that applied, and the columns that it leaves to defaults,
    where these are among `columns`."""
    few_shot, kwargs = prompt.get("few_shot") or {}, prompt.get("chat_template_kwargs") or {}
    column = prompt.get("messages") or prompt.get("token_ids") or next((each for each in DEFAULTS if each in columns), "")
    examples = f"{counted(few_shot.get('k') or 0, 'example')} of {few_shot.get('path')}, each as\n{few_shot.get('template')}"
    return [
        ("prompt template", prompt.get("template") or ""),
        ("prompt from column", "" if prompt.get("template") else column),
        ("examples in front", examples if few_shot else ""),
        ("system prompt", prompt.get("system") or ""),
        ("chat template", chat_template or prompt.get("chat_template") or ""),
        ("its variables", ", ".join(f"{name} {write_value(value)}" for name, value in kwargs.items())),
    ]


def _facts(
    out: Path,
    manifest: Manifest,
    summary: Mapping[str, Any],
    estimates: Sequence[Estimate],
    chat_template: str,
    obstacle: str,
    shown: Sequence[Excerpt],
) -> list[tuple[str, str]]:
    """What the run was: when and where it started, on what, with which settings."""
    job, versions = manifest.job, manifest.versions
    prompt, scored = job.get("prompt") or {}, job.get("mode") == "score"
    columns = {name for each in shown for name, value in each.columns.items() if value is not None}
    given = str(prompt.get("continuations") or "") if scored else ""
    drawn = {} if scored else job.get("generation", {})
    defaults = GenerationConfig().model_dump(mode="json")
    always = ("n", "temperature", "max_tokens", "seed")
    chosen = {name: value for name, value in drawn.items() if name in always or value != defaults.get(name)}
    settings = ", ".join(f"{name} {write_value(value)}" for name, value in chosen.items())
    verified, device = job.get("verify") or {}, summary.get("device", "")
    rows = [
        ("started", manifest.started.replace("T", " ").replace("+00:00", " UTC")),
        ("model", manifest.model_path),
        ("input", f"{job.get('input', {}).get('path', '')} ({counted(manifest.rows, 'row')})"),
        ("output", str(out.resolve())),
        ("mode", "score" if scored else ""),
        *_prompt_facts(prompt, chat_template, columns),
        ("continuations from column", given if given in columns else ""),
        ("settings", settings),
        ("verified by", str(verified.get("kind", ""))),
        ("right", right_from(estimates)),
        ("estimated", read_estimator(OutputFolder(out)) if estimates else ""),
        ("device", " ".join(("CPU" if device == "this processor" else device, _DTYPES.get(summary.get("itemsize", 0), "")))),
        ("prompts", obstacle),
        ("versions", f"tokabatch {versions.tokabatch}, torch {versions.torch}, transformers {versions.transformers}, "
         f"Python {versions.python}"),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value.strip()]
