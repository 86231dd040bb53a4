"""The commands about a run's output folder: `status`, `errors`, `report`, `check`, `score` and `export`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tokabatch.cli.arguments import OutArgument
from tokabatch.cli.printing import READER_ENDED, draws_tables, print_message, print_note, print_result
from tokabatch.cli.signals import stop_on_signals
from tokabatch.errors import EXIT_ERRORS, JobError, OutputError, Stopped, UsageError
from tokabatch.number_text import counted, others_text
from tokabatch.report.streams import first_fault


def status(
    out: OutArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Show how far the run in an output folder is.

    During a run, also its speed and an estimate of the time left. Only samples on disk are counted; a running job commits
    finished ones every output.flush_seconds.

    \b
    Examples
      tokabatch status out/quickstart
      watch -n 10 tokabatch status out/quickstart   every 10 seconds
      tokabatch status out/quickstart --json | jq .pending
    """
    found = read_state(out)
    first = ("state", "started", "model", "input")
    values = {**{name: getattr(found, name) for name in first}, **asdict(found), "pending": found.pending}
    pace = import_module("tokabatch.output.status").read_pace(out, time.time()) if found.state == "running" else None
    shown = import_module("tokabatch.report.folder_state")
    shares = import_module("tokabatch.output.status").read_shares(out, time.time())
    if as_json:
        folder = import_module("tokabatch.output.folder").OutputFolder(out)
        whole = found.pending == 0 and not found.unjudged and found.of_another_judge is None
        estimates = import_module("tokabatch.report.run_estimates").read_estimates(folder) if whole and found.ok else ()
        values |= {"pace": pace and asdict(pace), "shared": shares and asdict(shares)}
        values["estimates"] = {each.name: [each.value, each.low, each.high] for each in estimates or ()} or None
        print_result(json.dumps(values))
        return
    sections = shown.status_sections(values, pace and asdict(pace))
    sections += shown.share_sections(asdict(shares)) if shares is not None else ()
    if found.correct is not None:
        verdicts_of = import_module("tokabatch.report.summary").verdict_sections
        verdicts = import_module("tokabatch.report.run_estimates")
        folder = import_module("tokabatch.output.folder").OutputFolder(out)
        estimates, how = verdicts.read_estimates(folder) or (), verdicts.read_estimator(folder)
        unjudged = (found.unjudged or 0) + (found.of_another_judge or 0)
        sections += verdicts_of(estimates, found.committed, found.samples, how, unjudged=unjudged)
    print_result(sections)
    # Lines that are not wrapped, however narrow the terminal: they are to be pasted.
    print_result(
        ("" if draws_tables() else "\n") + import_module("tokabatch.report.render").plain(shown.next_section(out, values))
    )


def errors(
    out: OutArgument,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Show every error row, not only the first three of each code.")
    ] = False,
) -> None:
    """Name the rows of a run that became error rows, and say why.

    Shows the first three rows of each code. `tokabatch run --retry-errors` runs error rows again.

    \b
    Examples
      tokabatch errors out/quickstart
      tokabatch errors out/quickstart --all
    """
    read_state(out)
    closing = import_module("tokabatch.report.closing")
    found = import_module("tokabatch.output.excerpts").error_rows(out, None if all_rows else closing.PER_CODE)
    print_result((closing.errors_section(found, "--all"),) if found.rows else f"{out} holds no error rows")


def report(
    out: OutArgument,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE.html", help="File to write; default: OUT/report.html.", show_default=False),
    ] = None,
) -> None:
    """Write one HTML page about a run.

    It shows pass@k, samples with their prompts, lengths, throughput, memory use and settings. It needs no network and no
    other file.

    \b
    Examples
      tokabatch report out/quickstart
      tokabatch report out/quickstart --to page.html
    """
    if to is not None and to.suffix.lower() not in (".html", ".htm"):
        named = to / "report.html" if to.is_dir() or not to.name.strip(".") else to.with_suffix(".html")
        raise UsageError(f"--to {to}: the page is HTML; name {named} (a browser prints it as PDF)")
    found = read_state(out)
    if to is not None:
        place = import_module("tokabatch.output.export_target")
        place.check_target(place.OutputFolder(out), to, (to.suffix,))
    # It tells of caches that it cannot write in the home of a container's user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with _noting_replaced(to):
        print_result(str(import_module("tokabatch.report.review").write_report(out, to)))
    _note_incomplete(out, found.committed, found.samples, (found.unjudged or 0) + (found.of_another_judge or 0))


def check(out: OutArgument) -> None:
    """Read everything in an output folder back, and count.

    Every byte of every file is read and compared with its checksums; samples are counted by row and number. A damaged file
    is named, with the command that recomputes what it held and nothing else. Exit code: 0 complete, 75 intact so far, 4
    damaged.

    \b
    Example
      tokabatch check out/quickstart
    """
    refuse_absent(out)
    checked: Any = import_module("tokabatch.output.integrity").check(out)
    faults = [(fault.file, fault.problem) for fault in checked.faults]
    print_note(import_module("tokabatch.report.folder_state").check_sections(checked.facts, faults))
    if checked.remedy:
        # In one line, however narrow the terminal: it is to be pasted.
        print_note(f"\nThis repairs what is damaged, and changes nothing else\n  {checked.remedy}")
    raise typer.Exit(checked.exit_code)


def verify(out: OutArgument) -> None:
    """The earlier name of `check`."""
    print_message("`tokabatch verify` is called `tokabatch check` now")
    check(out)


def score(
    out: OutArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="verify.KEY=VALUE", help="Keys of the job under verify, in place of its own.", show_default=False
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE.parquet", help="Write the verdicts there, not into OUT.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only messages and the summary.")] = False,
) -> None:
    """Judge a run's samples again, without generating any.

    The judge is the job's verifier, for the samples that have no verdict, or another one, for all. Each file is replaced as
    a whole and records the verifier that judged it: after a stop, the same command judges the samples that are left; after a
    kill, those of the files that are left. The folder's job then verifies as given here. With --to nothing in the folder
    changes, and a run may be writing there.

    \b
    Examples
      tokabatch score out/quickstart verify.kind=exact
      tokabatch score out/quickstart verify.kind=./my_judge.py:grade
      tokabatch score out/quickstart verify.kind=exact --to verdicts.parquet
    """
    refuse_absent(out)
    doing = "keeping the verdicts so far" if to is None else f"{to} is not written"
    with _noting_replaced(to), stop_on_signals(doing) as stop:
        try:
            with stop.at_once():
                score = import_module("tokabatch.runner.score")
            with import_module("tokabatch.report.progress").open_progress(quiet) as progress:
                if to is None:
                    scored = score.score(out, overrides or (), progress, stop)
                else:
                    scored = score.score_to(out, to, overrides or (), progress, stop)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
    where = f"in {counted(scored.files, 'file')}" if to is None else f"into {to}"
    right = "" if to is None else f", {scored.right:,} right ({scored.right / max(1, scored.judged):.1%})"
    judged = f"{counted(scored.judged, 'sample')} judged {where}{right}"
    if to is None and not scored.files and scored.done:
        judged = "no sample is still to be judged" if scored.stops_rows else "every sample has a verdict"
    print_note(f"{out}: {judged}")
    if to is not None:
        _note_incomplete(out, scored.done, scored.samples)
    for reason, number in scored.reasons.most_common(3):
        print_note(f"no verdict for {counted(number, 'sample')}, counted as wrong: {reason}")
    if others := others_text(scored.reasons, 3):
        print_note(others)
    summary = import_module("tokabatch.report.summary")
    if to is not None and scored.judged and not scored.right and not scored.silent:
        print_note(": ".join(summary.NONE_RIGHT))
    if to is None:
        folder = import_module("tokabatch.output.folder").OutputFolder(out)
        how = import_module("tokabatch.report.run_estimates").read_estimator(folder)
        unclear = [] if scored.silent else summary.none_right(scored.estimates, scored.stops_rows)
        print_note(summary.verdict_sections(scored.estimates, scored.done, scored.samples, how, more=unclear))
    if scored.section:
        print_note(f"to continue this run, its job must say `{scored.section}`")
    if scored.silent:
        print_note(summary.no_verdict_text(scored.stops_rows, "give the same command again"))
        raise typer.Exit(EXIT_ERRORS)


def export(
    out: OutArgument,
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            metavar="FILE",
            help="File to write: .jsonl, .csv or .parquet; - for standard output.",
            show_default=False,
        ),
    ],
    nested: Annotated[
        bool, typer.Option("--nested", help="One record for each row of the input, with its samples as a list.")
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns", metavar="NAME,NAME", help="Only these columns, in this order; separated by commas.", show_default=False
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="correct|wrong|ok|error|cancelled",
            help="Only samples that are judged right (correct) or wrong, completed (ok), of error rows, or cancelled.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="jsonl|csv|parquet|openai",
            help="Form of the file; default: by its ending, jsonl for -. openai: the files of results and errors of a batch.",
            show_default=False,
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors",
            metavar="FILE",
            help="File of the errors, with --format openai; default: RESULTS.errors.jsonl.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a run's samples into one file, ordered by row and sample.

    The run of a batch file of OpenAI's API also has its files of results and errors, one line a request: --format openai.

    \b
    Examples
      tokabatch export out/quickstart --to samples.parquet
      tokabatch export out/quickstart --to rows.jsonl --nested
      tokabatch export out/quickstart --to right.csv --where correct
      tokabatch export out/quickstart --to - --columns id,text | head
      tokabatch export out/quickstart --to - --format csv > samples.csv
      tokabatch export out/openai_batch --to results.jsonl --format openai
    """
    to = Path("-") if str(to) == "/dev/stdout" else to
    if form not in (None, "jsonl", "csv", "parquet", "openai"):
        raise UsageError(f"--format {form}: accepts jsonl, csv, parquet or openai")
    if form == "openai":
        if nested or columns is not None or where is not None:
            raise UsageError("--nested, --columns and --where do not apply to --format openai; leave them out")
        refuse_absent(out)
        with _noting_replaced(to):
            print_note(write_batch(out, to, errors))
        return
    if errors is not None:
        raise UsageError("--errors belongs to --format openai; add it")
    if form is not None and str(to) != "-" and to.suffix != f".{form}":
        raise UsageError(
            f"--format {form}: --to {to} does not end in .{form}; name {to.with_suffix(f'.{form}')}, or leave --format out"
        )
    if form == "parquet" and str(to) == "-":
        raise UsageError("--format parquet cannot be written to standard output; name a file: --to samples.parquet")
    if where not in (None, "correct", "wrong", "ok", "error", "cancelled"):
        raise UsageError(f"--where {where}: accepts correct, wrong, ok, error or cancelled")
    refuse_absent(out)
    exporter = import_module("tokabatch.output.export")
    names = None if columns is None else tuple(name.strip() for name in columns.split(","))
    selection = exporter.Selection(nested, names, where)
    with _noting_replaced(None if str(to) == "-" else to), stop_on_signals("removing the unfinished file") as stop:
        try:
            with stop.at_once():
                if str(to) == "-":
                    with open(os.dup(1), "wb") as stream:
                        exported = exporter.export(out, stream, selection, form or "jsonl")
                else:
                    exported = exporter.export(out, to, selection)
        except BrokenPipeError:
            raise typer.Exit(READER_ENDED) from None
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
    _note_incomplete(out, exported.done, exported.planned, exported.unjudged)
    if str(to) != "-":
        samples, rows = counted(exported.samples, "sample"), counted(exported.rows, "row")
        print_note(f"{to}: {samples} of {rows}, {counted(exported.bytes, 'byte')}")
    elif (fault := first_fault(sys.stdout)) is not None:
        raise UsageError(f"standard output cannot be written: {fault.strerror}")


@contextmanager
def _noting_replaced(target: Path | None) -> Generator[None]:
    """Say so if a file that is there now is replaced by what follows."""
    there = target is not None and os.path.isfile(target)
    yield
    if there:
        print_message(f"replaced {target}")


def _note_incomplete(out: Path, done: int, samples: int | None, unjudged: int = 0) -> None:
    folder = import_module("tokabatch.output.folder").OutputFolder(out)
    manifest = import_module("tokabatch.output.manifest").read_manifest(folder)
    job = manifest.job if manifest is not None else {}
    state = import_module("tokabatch.report.folder_state")
    for note in (state.incomplete_note(done, samples, job), state.unjudged_note(out, done, unjudged)):
        if note is not None:
            print_message(note)


def write_batch(out: Path, to: Path, errors: Path | None) -> str:
    """Write the results and errors files of a batch file's run; what to say of them."""
    results = import_module("tokabatch.batch.results")
    with stop_on_signals("removing the unfinished file") as stop:
        try:
            with stop.at_once():
                written = results.write_results(out, to, errors)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
    return results.describe(written, to, errors)


def refuse_absent(out: Path) -> None:
    """Raise OutputError if there is no such folder, or no run in it, with the one that was meant. A run without a manifest is
    exported."""
    if not os.path.isdir(out) or (not os.path.isdir(out / "data") and _meant(out)):
        read_state(out)


def read_state(out: Path) -> Any:
    found = import_module("tokabatch.output.status").read_status(out)
    if found.state == "absent":
        raise OutputError(f"{out}: no run has written here; give the folder that the job names as output.path{_meant(out)}")
    return found


def _meant(out: Path) -> str:
    """Which folder was meant: the one that a job file names, the run around or below `out`, or one of nearly that name."""
    if out.is_file():
        job = import_module("tokabatch.job").Job
        with suppress(JobError):
            return f", here {job.load(out).output.path}"
    inside = sorted(each.parent for each in out.glob("*/manifest.json"))
    around = [each for each in out.parents if (each / "manifest.json").is_file() and (each / "data").is_dir()]
    if inside or around:
        more = ", …" * (len(inside) > 5)
        there = f"; the runs below it: {', '.join(map(str, inside[:5]))}{more}"
        return there if inside else f"; did you mean {around[0]}?"
    near = get_close_matches(out.name, sorted(each.name for each in out.parent.glob("*/")), n=1)
    return f"; did you mean {out.with_name(near[0])}?" if near and near[0] != out.name else ""
