"""What `tokabatch status` and `tokabatch check` show of an output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from tokabatch.number_text import count_text, counted, samples_so_far, seconds_text
from tokabatch.report.sections import Section

_LABELS = {"correct": "right", "shards": "files"}
"""Figures that other commands and the page call by another word than their name."""
_EXPLAINED = {
    "cancelled": ("cancelled", ""),
    "pending": ("pending", ", still to be computed"),
    "unjudged": ("still to be judged", ", computed without a verdict so far"),
    "without_verdict": ("without a verdict", ", as the judge could not judge them; they count as wrong"),
    "of_another_judge": ("judged earlier", " by another verifier, which does not count"),
}
"""Figures that are left out where they are 0: the label, and what follows the number."""


def status_sections(values: Mapping[str, Any], pace: Mapping[str, float | None] | None = None) -> tuple[Section, ...]:
    """The state of an output folder: (name, value) as they come, unknown ones left out; `pace` is that of a running job."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if value is None or (not value and name in _EXPLAINED):
            continue
        text = f"{value:.4f}" if isinstance(value, float) else count_text(value) if isinstance(value, int) else str(value)
        if name == "samples" and value and values.get("pending") is not None:
            # Rounded down: 100 % says that none is pending.
            text += f", {(value - values['pending']) * 1000 // value / 10}% done"
        label, meaning = _EXPLAINED.get(name, (_LABELS.get(name, name), ""))
        rows.append((label.replace("_", " "), f"{text}{meaning}"))
    if values.get("samples") is None and values.get("state") == "incomplete":
        lost = "manifest.json, without which it is unknown which job these samples belong to, and how many it has"
        rows.append(("missing", f"{lost}; restored from a copy, it lets the run be continued"))
    return (Section("Status", (*rows, *_pace(pace or {}))),)


def next_section(out: Path, values: Mapping[str, Any]) -> tuple[Section, ...]:
    """Commands to continue with: in every state those that are of use then, as at the end of a run."""
    folder, rows = quote(str(out)), [row for section in what_is_left(out, values) for row in section.rows]
    if values["state"] == "running":
        rows = [(f"watch -n 10 tokabatch status {folder}", "shows this every 10 seconds")]
    if values["state"] == "incomplete" and values["pending"] is None:
        rows.append((f"tokabatch export {folder} --to samples.jsonl", "the samples that are there in one file"))
    if values["errors"]:
        rows.append((f"tokabatch errors {folder}", "lists the error rows"))
    if values["state"] == "complete" and values["ok"]:
        rows.append((f"tokabatch export {folder} --to samples.jsonl", "all samples in one file"))
    if values["state"] == "complete" or values["ok"]:
        rows.append((f"tokabatch report {folder}", "a page with charts"))
    return (Section("Next", tuple(rows)),) if rows else ()


def what_is_left(out: Path, values: Mapping[str, Any]) -> tuple[Section, ...]:
    """The command that completes a run that is not complete, and what it does; none for one that is."""
    if (others := values.get("of_another_judge")) is not None:
        others += values.get("unjudged") or 0
        # Files of error rows alone hold none to judge, but must name the judge.
        does = f"judges {counted(others, 'sample')}" if others else "names the judge in the files that are left"
        return (Section("Next", ((f"tokabatch score {quote(str(out))}", does),)),)
    todo = (("computes the missing", values.get("pending")), ("judges", values.get("unjudged")))
    does = " and ".join(f"{verb} {counted(number, 'sample')}" for verb, number in todo if number)
    # Stopped was a run, or a score that had judged the other samples.
    same = "the same `tokabatch run` again" if values.get("pending") else "the same command again (`tokabatch run` or `score`)"
    return (Section("Next", ((same, does),)),) if does else ()


def incomplete_note(done: int, samples: int | None, job: Mapping[str, Any]) -> str | None:
    """What is said beside an export, a page or verdicts of `done` samples of so many; None of a run that has them all, or whose
    number of samples is not known. Texts that `job` scores finish in no order of their lengths."""
    if samples is None or done >= samples:
        return None
    longer = "" if job.get("mode") == "score" else "; short samples finish first, so the missing ones may be longer"
    return f"warning: the run is incomplete: {samples_so_far(done, samples)}{longer}"


def unjudged_note(out: Path, done: int, unjudged: int) -> str | None:
    """What is said beside an export or a page if `unjudged` of `done` samples are still to be judged."""
    if not unjudged:
        return None
    left = f"{unjudged:,} of {counted(done, 'sample')} {'has' if unjudged == 1 else 'have'} no verdict yet"
    return f"warning: {left}; `tokabatch score {quote(str(out))}` judges {'it' if unjudged == 1 else 'them'}"


def share_sections(shares: Mapping[str, Any]) -> tuple[Section, ...]:
    """Describe which process computes what of a shared run: its units, and a line for each active process."""
    rows = [("units", f"{count_text(shares['units'])}, {count_text(shares['complete'])} of them complete")]
    for task in shares["tasks"]:
        units = ", ".join(map(str, task["units"])) or "none yet"
        rows.append(
            (f"task {task['name']}", f"on {task['host']}, units {units}; seen {seconds_text(max(0.0, task['renewed']))} ago")
        )
    return (Section("Shared", tuple(rows)),)


def _pace(pace: Mapping[str, float | None]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if (running := pace.get("running_seconds")) is not None:
        rows.append(("running for", seconds_text(running)))
    if (commit := pace.get("commit_seconds")) is not None:
        rows.append(("last commit", f"{seconds_text(commit)} ago"))
    samples, tokens, left = (pace.get(name) for name in ("samples_per_second", "tokens_per_second", "seconds_left"))
    # The first samples to finish are few and short: their speed says nothing of the run's.
    if samples is not None and tokens is not None and left is not None:
        speed = f"samples per second {samples:,.3g}, output tokens {tokens:,.0f}, since the first commit of this start"
        rows.append(("speed", speed))
        rows.append(("time left", f"about {seconds_text(left)} at this speed"))
    elif rows:
        rows.append(("time left", "known after three commits, as is the speed"))
    return rows


def check_sections(facts: Mapping[str, int | str], faults: Sequence[tuple[str, str]]) -> tuple[Section, ...]:
    """What reading a folder back found; `faults` are files and what is wrong with them."""
    meaning = _EXPLAINED["pending"][1] if facts.get("pending") else ""
    rows = tuple(
        (name, f"{count_text(value)}{meaning if name == 'pending' else ''}" if isinstance(value, int) else value)
        for name, value in facts.items()
    )
    sections = [Section("Checked", rows)]
    if faults:
        sections.append(Section("Damaged", tuple(("", f"{file} {problem}") for file, problem in faults)))
    return tuple(sections)
