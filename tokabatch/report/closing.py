"""The end of a run's summary, read from its output folder: a few samples, the error rows, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tokabatch.errors import TokabatchError
from tokabatch.number_text import counted, figure_text, share_text
from tokabatch.output.excerpts import ErrorRow, ErrorRows, Excerpt, error_rows, excerpts, finish_reasons
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import read_manifest
from tokabatch.report.render import plain
from tokabatch.report.sections import Section
from tokabatch.report.summary import RunSummary
from tokabatch.scoring.expected import expected_answers

_SAMPLES = 3
PER_CODE = 3
_SAMPLE_LINES, _SAMPLE_CHARACTERS = 10, 600
_MESSAGE_CHARACTERS, _VALUE_CHARACTERS = 300, 80


def closing_sections(out: Path, summary: RunSummary) -> tuple[Section, ...]:
    """Three samples, right and wrong ones where they were judged, and the first error rows of each code. What cannot be read
    back is left out: how the run ended is shown all the same."""
    sections: list[Section] = []
    try:
        if summary.ok:
            few = _few(out)
            scored = any(each.finish_reason == "scored" for each in few)
            title = (
                "Likeliest texts, with log-probabilities" if scored and summary.verifies else "Texts, with log-probabilities"
            )
            title = title if scored else "Samples"
            sections += () if scored else _cut_off(out)
            # None, where the folder was moved meanwhile.
            manifest = read_manifest(OutputFolder(out)) if any(each.judged for each in few) else None
            verify = (manifest and manifest.job.get("verify")) or {}
            sections += [Section(title, tuple(row for each in few for row in _sample(each, verify)))] if few else []
        if summary.errors:
            sections.append(errors_section(error_rows(out, PER_CODE)))
    except (TokabatchError, OSError):
        pass
    return tuple(sections)


def _cut_off(out: Path) -> tuple[Section, ...]:
    """How many samples ran into a limit, where any did: they are not complete, and mostly wrong where they are judged."""
    counts = finish_reasons(OutputFolder(out))
    if not counts["length"]:
        return ()
    text = f"{counted(counts['length'], 'sample')}{share_text(counts['length'], counts.total())}"
    remedy = "ended at max_tokens or the end of the context; if answers are not complete, raise generation.max_tokens"
    return (Section("Cut off", (("", f"{text} {remedy}"),)),)


def errors_section(errors: ErrorRows, more_by: str = "") -> Section:
    """The error rows by code, and how many more there are than are named; `more_by` is the option that names them."""
    table: list[tuple[str, str, str]] = []
    for code, group in groupby(errors.rows, key=lambda each: each.code):
        named = list(group)
        for place, each in enumerate(named):
            table.append(("" if place else code, _row(each), _cut(each.message, 1, _MESSAGE_CHARACTERS)))
        if more := errors.counts[code] - len(named):
            table.append(("", "", f"and {more:,} more of this code{more_by and f'; {more_by} shows them'}"))
    ids = any("(" in row for _, row, _ in table)
    return Section("Error rows", tuple(table), ("code", "row (id)" if ids else "row", "message"))


def _few(out: Path) -> list[Excerpt]:
    found = excerpts(out, _SAMPLES)
    right, wrong = found.get("right", ()), found.get("wrong", ())
    judged = (*right[:1], *wrong[:1], *right[1:], *wrong[1:])
    return sorted((*judged, *found.get("first", ()))[:_SAMPLES], key=lambda each: (each.row_index, each.sample_index))


def judged_values(sample: Excerpt, verify: Mapping[str, Any]) -> dict[str, Any]:
    """What the judge has found in a sample, and what a verifier of the package expected; `verify` is the job's section."""
    expected = expected_answers(verify, sample.columns) if sample.judged else []
    return {**sample.judged, **({"expected": " or ".join(expected)} if expected else {})}


def judged_text(values: Mapping[str, Any]) -> str:
    """The same on one line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    text = "nothing" if value is None else figure_text(value) if isinstance(value, float) else " ".join(str(value).split())
    return (text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]} […]") or "an empty text"


def _sample(sample: Excerpt, verify: Mapping[str, Any]) -> list[tuple[str, str]]:
    verdict = ", right" if sample.correct else "" if sample.correct is None else ", wrong"
    verdict = ", no verdict" if sample.unjudged else verdict
    scored = sample.finish_reason == "scored"
    label = f"row {sample.row_index:,}, {'text' if scored else 'sample'} {sample.sample_index:,}{verdict}"
    text = _cut(sample.text.strip(), _SAMPLE_LINES, _SAMPLE_CHARACTERS) or "(no text)"
    text = text if not scored or sample.logprob is None else f"{sample.logprob:.2f}  {text}"
    judged = judged_text(judged_values(sample, verify))
    return [(label, text), *((("judged", judged),) if judged else ())]


def _row(error: ErrorRow) -> str:
    return f"{error.row_index:,}" if error.id in (None, str(error.row_index)) else f"{error.row_index:,} ({error.id})"


def next_steps(out: Path, summary: RunSummary) -> str:
    """Return commands to continue with, as text that is not wrapped: each is on one line, however narrow the terminal, to be
    pasted."""
    folder = shlex.quote(str(out))
    rows: list[tuple[str, str]] = []
    if summary.pending and summary.exit_code == 0:
        rows.append((f"tokabatch status {folder}", "shows the progress of the other processes"))
    elif summary.pending:
        rows.append(("the same command again", f"computes the missing {counted(summary.pending, 'sample')}"))
    if summary.errors:
        rows.append((f"tokabatch errors {folder}", "lists the error rows"))
        if not summary.pending:
            permanent = summary.error_counts and all(_is_of_input(code) for code, _ in summary.error_counts)
            if permanent and not summary.ok:
                rows.append(("the same command", "once the job is right: starts over"))
            does = "once the input is right" if permanent else "runs them again"
            rows.append(("the same command with --retry-errors", does))
    if summary.no_verdict and summary.stops_rows:
        rows.append(("the same command with --overwrite", "starts over"))
    elif summary.unverified and not summary.pending and not summary.stops_rows:
        rows.append((f"tokabatch score {folder}", "judges the samples without a verdict again"))
    if summary.ok:
        rows.append((f"tokabatch export {folder} --to samples.jsonl", "all samples in one file"))
    rows.append((f"tokabatch report {folder}", "a page with charts"))
    return plain((Section("Next", tuple(rows)),))


def _is_of_input(code: str) -> bool:
    """Whether a row with this error fails again as long as the input and the job are as they are."""
    return code.startswith(("bad_", "template_")) or code in (
        "empty_prompt",
        "missing_field",
        "special_token",
        "prompt_too_long",
    )


def _cut(text: str, lines: int, characters: int) -> str:
    kept = "\n".join(text[:characters].splitlines()[:lines])
    return kept if len(kept) == len(text.rstrip("\n")) else f"{kept} […]"
