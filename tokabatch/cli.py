"""The command line: the only module that prints results, reports errors and decides the exit code.

Nothing heavy is imported here, so that help answers at once: a command fetches what it needs through `_load`.
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tokabatch import __version__
from tokabatch.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    DamageError,
    InputError,
    JobError,
    ModelError,
    OutputError,
    Stopped,
    TokabatchError,
    UsageError,
)
from tokabatch.report.streams import TolerantFile, first_fault, make_tolerant
from tokabatch.runner.interruption import Interruption

if TYPE_CHECKING:
    from tokabatch.job import Job
    from tokabatch.report.progress import Progress
    from tokabatch.report.summary import RunSummary, Section

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_READER_ENDED = 128 + signal.SIGPIPE
_DEVICES = "h200, h100, a100 or l40s, or a variant such as h100-pcie or a100-40gb"

_KEY_OF = {ModelError: "model.path", InputError: "input.path"}
"""Where in a job to look for what a message is about that names no key."""

_HELP = """Offline batch inference: complete every row of a dataset with a language model, each row n times.

A job file says what to do; any key of it can be overridden on the command line. The job is checked and planned
before the weights load, the results are Parquet files in the job's output folder.

\b
Examples
  tokabatch plan jobs/quickstart.yaml                     check a job, show its first prompt and its size
  tokabatch run jobs/quickstart.yaml                      run it; again after a crash or a stop: what is missing is computed
  tokabatch run jobs/quickstart.yaml generation.n=4       with one key changed
  tokabatch slurm jobs/gsm8k.yaml --tasks 16              write the batch script of a run on many hosts
  tokabatch keys generation                               the keys of a section of a job file, explained
  tokabatch plan JOB.yaml --simulate --lengths 200        predict its time, cost and KV use
  tokabatch status out/quickstart                         how far a run is
  tokabatch report out/quickstart                         one HTML page about the run
  tokabatch score out/quickstart verify.kind=exact        judge the samples again, without computing any
  tokabatch check out/quickstart                          read every file back and count
  tokabatch export out/quickstart --to samples.jsonl      one file, ordered by row and sample
  tokabatch errors out/quickstart                         which rows became error rows, and why
  tokabatch batch requests.jsonl --model M --to results.jsonl   answer a batch file of OpenAI's API
  tokabatch serve jobs/quickstart                         a server of OpenAI's API over the same engine

\b
Exit codes
  0    complete
  1    internal error
  2    the command line, the job file or a file it names is wrong, or the output folder can never take the results, or has
       taken none of two starts in a row; the message says what, and what to do about it
  3    complete, but with more errors than errors.max_fraction allows
  4    a committed file is damaged or missing (the message names it, and the command that computes it again), or the
       sample counts do not add up, which is a bug (please report it)
  75   stopped before the end (SIGTERM, SIGHUP, SIGUSR1, disk full, an error row under errors.policy=stop); what was
       finished is committed, the same command goes on from there
  130  interrupted (Ctrl-C); as 75
"""

_OVERRIDES_HELP = """key=value, dotted as in the file: generation.n=4 engine.page_size=32 model.dtype=float32. Numbers take
1K (1,024), 1k (1,000), M and G; a list is written as in YAML: 'generation.stop=["\\n"]'."""

_DOTTED_OPTION = re.compile(r"--?((?:[a-z_]+\.)+[a-z_]+)(=.*)?", re.DOTALL)


class _Command(TyperCommand):
    """A command that says what is missing or misspelled where that can be told, and what to write instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # For completion.
            return super().parse_args(ctx, args)
        for dotted in filter(None, map(_DOTTED_OPTION.fullmatch, args)):
            remedy = shlex.quote(f"{dotted[1]}{dotted[2] or '=VALUE'}")
            raise UsageError(f"{dotted[0]}: a key of the job is written without dashes: {remedy}")
        named = ((each.opts[0], each.metavar or "") for each in self.params if each.required and not args)
        missing = [f"{option} FILE" if option.startswith("-") else metavar for option, metavar in named]
        if missing:
            example = re.search(r"^ *(tokabatch .*?)(?:  |$)", self.help or "", re.MULTILINE)
            remedy = f"; for example `{example[1]}`" if example else ""
            raise UsageError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{remedy}. See --help for more"
            )
        return super().parse_args(ctx, args)


app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def program() -> None:
    """`main` in a process of its own. The process ends without the destructors of native libraries: one whose thread still runs
    would abort it then, after all is committed and printed."""
    status: list[int] = []

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        if status:
            os._exit(status[0])

    # Registered first, so it runs last.
    atexit.register(leave)
    try:
        main()
        status.append(0)
    except SystemExit as end:
        status.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def main() -> None:
    """The command line. An error of ours ends in one message and its exit code; anything unforeseen in its traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    make_tolerant()
    try:
        app()
    except TokabatchError as error:
        several = isinstance(error, JobError) and "\n" in str(error)
        print(f"errors:\n{error}" if several else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        _print_result(f"tokabatch {__version__}")
        raise typer.Exit


def _print_keys(wanted: bool) -> None:
    if wanted:
        keys()
        raise typer.Exit


def _complete_key(incomplete: str) -> list[str]:
    return [f"{key.name}=" for key in _load("tokabatch.job").Job.describe_keys() if key.name.startswith(incomplete)]


def _complete_section(incomplete: str) -> list[str]:
    return [each.name for each in _load("tokabatch.job").Job.describe_sections() if each.name.startswith(incomplete)]


JobArgument = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help=_OVERRIDES_HELP, show_default=False, autocompletion=_complete_key),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of a run.", show_default=False)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder, start over.")]
RetryOption = Annotated[bool, typer.Option("--retry-errors", help="Run the error rows of the run there again.")]
RepairOption = Annotated[bool, typer.Option("--repair", help="Compute again what damaged or missing files held.")]
KeysOption = Annotated[
    bool, typer.Option("--keys", callback=_print_keys, is_eager=True, help="Explain every key of a job file, and exit.")
]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command(cls=_Command)
def run(
    job: JobArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    repair: RepairOption = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Let other runs of the job write there, too, each taking units of the plan.")
    ] = False,
    units: Annotated[int, typer.Option("--units", min=1, help="Into how many units the first of them cuts the plan.")] = 256,
    task: Annotated[str, typer.Option("--task", help="What `tokabatch status` calls this one of them.")] = "",
    lease: Annotated[
        float,
        typer.Option(
            "--lease", min=0.5, help="Seconds after which others take over the units of a run that no longer responds."
        ),
    ] = 60.0,
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Stop as on SIGTERM so many seconds from now.", min=0, show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only messages and the summary.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="In the summary, the figures of scheduler and engine, too.")
    ] = False,
    keys: KeysOption = False,
) -> None:
    """Run a job and print its summary.

    The results are Parquet files under OUT/data, which appear while the run goes on. Progress goes to standard error,
    the summary to standard output.

    A run that the output folder holds is continued: whatever ended it, the same command computes the missing samples.
    Engine settings may change, but for kv_cache_dtype; generation.n may be raised and rows added at the end of the
    input. Anything else that decides the output is refused, and the difference shown.

    \b
    Examples
      tokabatch run jobs/quickstart.yaml
      tokabatch run jobs/quickstart.yaml generation.n=4 output.path=out/four --quiet
      tokabatch run jobs/quickstart.yaml generation.n=32      16 more samples of each row
      tokabatch run jobs/quickstart.yaml --overwrite          delete the results, begin again
      tokabatch run jobs/quickstart.yaml --shared             one of any number of processes on any hosts (`tokabatch slurm`)
    """
    with _stop_on_signals() as stop, _stop_after(deadline), _checked_job(job, overrides, shared=shared) as loaded:
        share = _load("tokabatch.runner.shared").Shared(task, units, lease) if shared else None
        summary = _run(loaded, stop, quiet, overwrite=overwrite, retry_errors=retry_errors, repair=repair, shared=share)
    _print_summary(loaded, summary, verbose)
    raise typer.Exit(summary.exit_code)


@app.command(cls=_Command)
def batch(
    requests: Annotated[
        str, typer.Argument(metavar="REQUESTS.jsonl", help="A batch file of OpenAI's API; its path.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="As model.path in a job file.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="RESULTS.jsonl", help="File of the results.", show_default=False)],
    overrides: OverridesArgument = None,
    errors: Annotated[
        Path | None,
        typer.Option("--errors", metavar="FILE", help="File of the errors; default: RESULTS.errors.jsonl.", show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    repair: RepairOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only messages and the summary.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="In the summary, the figures of scheduler and engine, too.")
    ] = False,
) -> None:
    """Answer a batch file of OpenAI's API: chat and completions requests in, files of results and errors out.

    The run is an ordinary one, in the folder RESULTS.jsonl.run (output.path): whatever ended it, the same command computes the
    missing answers. The files are written when all of them are there. Whatever model the requests name, MODEL answers.

    \b
    Examples
      tokabatch batch requests.jsonl --model Qwen/Qwen3-0.6B --to results.jsonl
      tokabatch batch requests.jsonl --model jobs/quickstart --to results.jsonl generation.max_tokens=200
    """
    batches = _load("tokabatch.batch.job")
    with _stop_on_signals() as stop:
        loaded = batches.batch_job(requests, model, to, errors, overrides or ())
        _load("tokabatch.precheck").refuse_early(loaded)
        summary = _run(loaded, stop, quiet, overwrite=overwrite, retry_errors=retry_errors, repair=repair)
    _print_summary(loaded, summary, verbose)
    if not summary.pending:
        _print_note(_write_batch(Path(loaded.output.path), to, errors))
    raise typer.Exit(summary.exit_code)


@app.command(cls=_Command)
def slurm(
    job: JobArgument,
    overrides: OverridesArgument = None,
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Tasks of the array.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-task", min=0, help="GPUs of each.")] = 0,
    cpus: Annotated[int, typer.Option("--cpus-per-task", min=0, help="CPU cores of each; 0: as the site has it.")] = 0,
    limit: Annotated[str, typer.Option("--time", help="Time limit of one start of a task, as sbatch has it.")] = "",
    option: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="KEY=VALUE", help="Another option of sbatch: partition=gpu.", show_default=False),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option("--setup", metavar="LINE", help="Shell before the run: 'module load cuda'.", show_default=False),
    ] = None,
    command: Annotated[
        str, typer.Option("--command", help="What to call: 'apptainer exec --nv IMAGE.sif tokabatch'.")
    ] = "tokabatch",
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Default: JOB.sbatch.", show_default=False)] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it as well.")] = False,
) -> None:
    """Write the batch script that runs a job as an array of tasks on Slurm.

    Every task is `tokabatch run --shared`: it takes units of the plan until none is left, so one that ends early takes what
    others would have done, and one that never starts costs nothing. Ahead of the time limit, and when it is preempted, a task
    commits what it has, and the script has it requeued.

    \b
    Examples
      tokabatch slurm jobs/gsm8k.yaml --tasks 16 --gpus-per-task 1 --time 4:00:00
      tokabatch slurm jobs/gsm8k.yaml --tasks 16 --sbatch partition=gpu --setup '. venv/bin/activate' --submit
    """
    _load("tokabatch.job").Job.load(job, *(overrides or ()))
    module, script = _load("tokabatch.cluster.slurm"), to or Path(f"{job.stem}.sbatch")
    array = module.Array(tasks, gpus, cpus, limit, options=tuple(option or ()), setup=tuple(setup or ()), command=command)
    try:
        script.write_text(module.batch_script(job, tuple(overrides or ()), array, Path.cwd()))
    except OSError as error:
        raise UsageError(f"--to {script} cannot be written: {error.strerror}; name a file elsewhere") from error
    _print_result(module.submit(script) if submit else f"{script}: submit it with `sbatch {script}`")


@app.command(cls=_Command)
def plan(
    job: JobArgument,
    overrides: OverridesArgument = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate the whole run as well: time, cost, KV use.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help=f"Simulate on this device instead of this machine: {_DEVICES}.")
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths", help="Output tokens: max (max_tokens), MEAN or MEAN:SIGMA (log-normal; 0.7), or a run's OUT."
        ),
    ] = "max",
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Measured cost model (see `tokabatch profile`) in place of the roofline.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Money for an hour of the device.")] = None,
    keys: KeysOption = False,
) -> None:
    """Check a job and show what it would do.

    Loads no weights and writes nothing. Reads the whole input: counts rows, samples and tokens, shared and unshared,
    and shows the first prompt with its token ids and the settings in effect. With --simulate the scheduler runs the whole
    job against a cost model.

    \b
    Examples
      tokabatch plan jobs/quickstart.yaml generation.n=100
      tokabatch plan jobs/quickstart.yaml --simulate --lengths 70:0.4
      tokabatch plan jobs/gsm8k.yaml --simulate --device h200 --lengths 150 --price 3.5
    """
    if not simulate and (device, profile, price, lengths) != (None, None, None, "max"):
        raise typer.BadParameter("--device, --lengths, --profile and --price belong to --simulate; add it")
    # Rows are counted where someone watches; lines in a log would tell no more than the result does.
    with _checked_job(job, overrides) as loaded, _starting(not os.isatty(2)) as progress:
        planner = _load("tokabatch.runner.plan")
        snapshot, begun = _load("tokabatch.report.progress").ProgressSnapshot, time.monotonic()

        def on_rows(rows: int, errors: int) -> None:
            progress.update(snapshot("reading", time.monotonic() - begun, rows_done=rows, errors=errors))

        if simulate:
            scenario = _load("tokabatch.forecast.predict").Scenario(device, profile, price, lengths)
            report, outlook = planner.plan_and_simulate(loaded, scenario, on_rows)
        else:
            report, outlook = planner.plan(loaded, on_rows), None
    sections = _load("tokabatch.report.summary").plan_sections
    if outlook is None:
        _print_result(sections(report))
        return
    _print_result((*sections(report), *_load("tokabatch.report.outlook").outlook_sections(outlook)))


@app.command(cls=_Command)
def keys(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION", help="A section or a key; default: all.", show_default=False, autocompletion=_complete_section
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables in Markdown.")] = False,
) -> None:
    """Explain the keys of a job file: what each does, what it accepts, its default, an example.

    \b
    Examples
      tokabatch keys generation
      tokabatch keys prompt.few_shot.k
    """
    sections = _load("tokabatch.job").Job.describe_sections()
    if section is not None:
        names = {name for each in sections for name in (each.name, *(key.name for key in each.keys))}
        inside = [name for name in names if name == section or name.startswith(f"{section}.")]
        if not inside:
            by_leaf = {name.rpartition(".")[2]: name for name in names} | {name: name for name in names}
            near = get_close_matches(section, by_leaf, n=1)
            hint = (
                f"did you mean `{by_leaf[near[0]]}`?"
                if near
                else f"there are {', '.join(each.name for each in sections if each.name)}"
            )
            raise UsageError(f"there is no section or key {section}; {hint}")
        kept = ((each, tuple(key for key in each.keys if key.name in inside)) for each in sections)
        sections = tuple(replace(each, keys=chosen) for each, chosen in kept if chosen)
    render = _load("tokabatch.report.key_reference")
    _print_result(render.markdown(sections) if markdown else render.plain(sections))


@app.command(cls=_Command)
def profile(
    out: OutArgument,
    to: Annotated[Path, typer.Option("--to", metavar="PROFILE.json", help="File to write.", show_default=False)],
    device: Annotated[
        str | None, typer.Option("--device", help=f"The device it ran on, if the run has not noted it: {_DEVICES}.")
    ] = None,
) -> None:
    """Fit a cost model to the steps of a finished run, for `plan --simulate --profile` and the key engine.profile.

    \b
    Example
      tokabatch profile out/quickstart --to profile.json
    """
    fitted = _load("tokabatch.forecast.predict").profile_run(out, to, device)
    terms = zip(_load("tokabatch.forecast.profile").TERMS, fitted.coefficients, strict=True)
    _print_note(_load("tokabatch.report.summary").profile_sections(str(to), dict(terms)))


@app.command(cls=_Command)
def status(out: OutArgument) -> None:
    """Show how far the run in an output folder is; while it goes on, its speed and an estimate of the time left.

    What is counted is on disk: a running job commits finished samples every output.flush_seconds.

    \b
    Example
      tokabatch status out/quickstart
    """
    found = _read_state(out)
    first = ("state", "started", "model", "input")
    values = {**{name: getattr(found, name) for name in first}, **asdict(found), "pending": found.pending}
    pace = _load("tokabatch.output.status").read_pace(out, time.time()) if found.state == "running" else None
    summary = _load("tokabatch.report.summary")
    sections = summary.status_sections(values, pace and asdict(pace))
    shares = _load("tokabatch.output.status").read_shares(out, time.time())
    sections += summary.share_sections(asdict(shares)) if shares is not None else ()
    if found.correct is not None:
        verdicts = _load("tokabatch.report.run_estimates")
        estimates, how = verdicts.read_estimates(out) or (), verdicts.read_estimator(out)
        sections += summary.verdict_sections(estimates, found.committed, found.samples, how)
    _print_result(sections)


@app.command(cls=_Command)
def errors(
    out: OutArgument,
    all_rows: Annotated[bool, typer.Option("--all", help="Name every error row, not only the first of each code.")] = False,
) -> None:
    """Name the rows of a run that became error rows, and say why.

    Shows the first three rows of each code. `tokabatch run --retry-errors` runs error rows again.

    \b
    Examples
      tokabatch errors out/quickstart
      tokabatch errors out/quickstart --all
    """
    _read_state(out)
    closing = _load("tokabatch.report.closing")
    found = _load("tokabatch.output.excerpts").error_rows(out, None if all_rows else closing.PER_CODE)
    _print_result((closing.errors_section(found),) if found.rows else f"{out} holds no error rows")


@app.command(cls=_Command)
def report(
    out: OutArgument,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE.html", help="Default: OUT/report.html.", show_default=False),
    ] = None,
) -> None:
    """Write one HTML page about a run: throughput, KV use, lengths, sharing, pass@k, predicted and actual time.

    It needs no network and no other file.

    \b
    Example
      tokabatch report out/quickstart
    """
    _print_result(str(_load("tokabatch.report.review").write_report(out, to)))


@app.command(cls=_Command)
def check(out: OutArgument) -> None:
    """Read everything in an output folder back, and count.

    Every byte of every file is read and held against its checksums; samples are counted by row and number. A damaged file
    is named, with the command that recomputes what it held and nothing else. Exit code: 0 complete, 75 intact so far, 4
    damaged.

    \b
    Example
      tokabatch check out/quickstart
    """
    checked: Any = _load("tokabatch.output.integrity").check(out)
    faults = [(fault.file, fault.problem) for fault in checked.faults]
    _print_note(_load("tokabatch.report.summary").check_sections(checked.facts, faults))
    if checked.remedy:
        # In one line, however narrow the terminal: it is to be pasted.
        _print_note(f"\nThis repairs what is damaged, and changes nothing else\n  {checked.remedy}")
    raise typer.Exit(checked.exit_code)


@app.command(cls=_Command, hidden=True)
def verify(out: OutArgument) -> None:
    """The earlier name of `check`."""
    print("`tokabatch verify` is called `tokabatch check` now", file=sys.stderr)
    check(out)


@app.command(cls=_Command)
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
) -> None:
    """Judge a run's samples again, by the job's verifier or another one, without computing any.

    Each file is replaced whole, and says by what it was judged: where the command is stopped or killed, the same one goes on
    behind the files that are done. The folder's job then verifies as given here. With --to nothing in the folder changes, and a
    run may be writing there.

    \b
    Examples
      tokabatch score out/quickstart verify.kind=exact
      tokabatch score out/quickstart verify.kind=./my_judge.py:grade verify.options='{strict: true}'
      tokabatch score out/quickstart verify.kind=exact --to verdicts.parquet
    """
    score = _load("tokabatch.runner.score")
    with _stop_on_signals("leaving the files that are not judged yet as they are") as stop:
        try:
            if to is None:
                scored = score.score(out, overrides or (), lambda text: print(text, file=sys.stderr), stop)
            else:
                scored = score.score_to(out, to, overrides or (), stop)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
    where = f"in {scored.files:,} files" if to is None else f"into {to}"
    _print_note(f"{out}: {scored.judged:,} samples judged {where}")
    for reason, number in scored.reasons.most_common(3):
        _print_note(f"no verdict for {number:,} samples: {reason}")
    if to is None:
        _print_note(_load("tokabatch.report.summary").verdict_sections(scored.estimates, scored.done, scored.samples))


@app.command(cls=_Command)
def export(
    out: OutArgument,
    to: Annotated[
        Path,
        typer.Option(
            "--to", metavar="FILE", help="File to write: .jsonl, .csv or .parquet; - for standard output.", show_default=False
        ),
    ],
    nested: Annotated[bool, typer.Option("--nested", help="One record a row, its samples as a list.")] = False,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="NAME,NAME", help="Only these columns, in this order.", show_default=False),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where", metavar="correct|wrong|ok|error|cancelled", help="Only samples that are so.", show_default=False
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="samples|openai", help="openai: the results and errors files of a batch file.")
    ] = "samples",
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors", metavar="FILE", help="With --format openai; default: RESULTS.errors.jsonl.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a run's samples into one file, ordered by row and sample.

    The run of a batch file of OpenAI's API also has its files of results and errors, one line a request: --format openai.

    \b
    Examples
      tokabatch export out/quickstart --to samples.parquet
      tokabatch export out/quickstart --to rows.jsonl --nested
      tokabatch export out/quickstart --to right.csv --columns question,text --where correct
      tokabatch export out/quickstart --to - --columns id,text | head
      tokabatch export out/openai_batch --to results.jsonl --format openai
    """
    if form not in ("samples", "openai"):
        raise UsageError(f"--format {form}: accepts samples or openai")
    if form == "openai":
        if nested or columns is not None or where is not None:
            raise UsageError("--nested, --columns and --where are of --format samples; leave them out")
        _print_note(_write_batch(out, to, errors))
        return
    if errors is not None:
        raise UsageError("--errors belongs to --format openai; add it")
    if where not in (None, "correct", "wrong", "ok", "error", "cancelled"):
        raise UsageError(f"--where {where}: accepts correct, wrong, ok, error or cancelled")
    exporter = _load("tokabatch.output.export")
    names = None if columns is None else tuple(name.strip() for name in columns.split(","))
    selection = exporter.Selection(nested, names, where)
    with _stop_on_signals("taking away what is unfinished") as stop:
        try:
            with stop.at_once():
                if str(to) == "-":
                    with open(os.dup(1), "wb") as stream:
                        exported = exporter.export(out, stream, selection)
                else:
                    exported = exporter.export(out, to, selection)
        except BrokenPipeError:
            raise typer.Exit(_READER_ENDED) from None
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
    if str(to) != "-":
        _print_note(f"{to}: {exported.samples:,} samples of {exported.rows:,} rows, {exported.bytes:,} bytes")
    elif (fault := first_fault(sys.stdout)) is not None:
        raise UsageError(f"standard output cannot be written: {fault.strerror}")


@app.command(cls=_Command)
def download(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face id, such as Qwen/Qwen3-0.6B.", show_default=False)
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.", show_default=False)] = None,
) -> None:
    """Fetch a model from the Hugging Face hub.

    It goes into the hub's cache; the folder it lies in is printed. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    \b
    Example
      tokabatch download Qwen/Qwen3-0.6B
    """
    _print_result(str(_load("tokabatch.model.resolve").resolve_model(model, revision, key="MODEL", revision_key="--revision")))


@app.command(cls=_Command)
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the model.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Keys under model, prompt, generation, engine and server.", show_default=False
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API: completions, chat, log-probabilities of given texts.

    Requests that wait at the same time are ordered by shared prefix and join one plan; the same seed gives the same answer
    under any load. generation.* are the defaults of what a request leaves out. Needs the extra `serve`:
    pip install 'tokabatch[serve]'. The first SIGTERM or Ctrl-C lets what runs be finished (server.grace_seconds), the second
    ends at once.

    \b
    Examples
      tokabatch serve jobs/quickstart
      tokabatch serve jobs/quickstart server.port=8080 server.host=0.0.0.0 server.api_key=secret
      tokabatch serve jobs/quickstart generation.max_tokens=512 engine.kv_cache_tokens=64K
    """
    try:
        server = _load("tokabatch.serve.server")
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError(f"a server needs {error.name}; install it with: pip install 'tokabatch[serve]'") from error
    config = _load("tokabatch.serve.settings").ServiceConfig.load(model, *(overrides or ()))
    raise typer.Exit(server.serve(config, lambda text: print(text, file=sys.stderr)))


@app.command(cls=_Command)
def ping(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)],
    url: Annotated[str, typer.Option("--url", help="Where the server is.")] = "http://127.0.0.1:8000",
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens of the answer.")] = 64,
    api_key: Annotated[str | None, typer.Option("--api-key", help="The server's key.", envvar="OPENAI_API_KEY")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 300.0,
) -> None:
    """Send one prompt to a running server and print the answer.

    \b
    Example
      tokabatch ping "Question: what is 3 + 4?" --max-tokens 32
    """
    answer = _load("tokabatch.serve.ping").ping(url, prompt, chat=chat, max_tokens=max_tokens, api_key=api_key, timeout=timeout)
    _print_result(answer)


@contextmanager
def _checked_job(path: Path, overrides: list[str] | None, *, shared: bool = False) -> Generator[Job, None, None]:
    """The job of a file and its overrides, refused before anything slow is imported where that can be told. A refusal from
    inside is raised with where the key was written that it names."""
    loaded, written = _load("tokabatch.job").Job.load_with_places(path, *(overrides or ()))
    try:
        _load("tokabatch.precheck").refuse_early(loaded, shared=shared)
        yield loaded
    except DamageError:
        raise
    except UsageError as error:
        key = next((key for kind, key in _KEY_OF.items() if isinstance(error, kind)), "")
        raise type(error)(written.locate(str(error), key)) from error


def _run(job: Any, stop: Interruption, quiet: bool, **how: Any) -> RunSummary:
    """Run a job with its progress shown; the summary's times count from the start of this process. Exits where it was stopped
    before it began."""
    try:
        with _starting(quiet) as progress:
            runner = _load("tokabatch.runner.run")
            before = _seconds_since_start()
            summary: RunSummary = runner.run(job, progress, stop, **how)
        return replace(summary, seconds=summary.seconds + before, load_seconds=summary.load_seconds + before)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


@contextmanager
def _starting(quiet: bool) -> Generator[Progress, None, None]:
    """The display of progress, which shows something before anything slow is imported."""
    module = _load("tokabatch.report.progress")
    with module.open_progress(quiet) as progress:
        progress.update(module.ProgressSnapshot("starting", 0.0))
        yield progress


def _seconds_since_start() -> float:
    """Since this process was started."""
    return max(0.0, time.time() - _load("psutil").Process().create_time())


def _print_summary(job: Any, summary: RunSummary, verbose: bool) -> None:
    sections = _load("tokabatch.report.summary").run_sections(summary, verbose)
    closing, out = _load("tokabatch.report.closing"), Path(job.output.path)
    _print_note((*sections, *closing.closing_sections(out, summary)))
    # A terminal's tables end in an empty line already.
    _print_note(("" if sys.stdout.isatty() else "\n") + closing.next_steps(out, summary))


def _write_batch(out: Path, to: Path, errors: Path | None) -> str:
    """Write the results and errors files of a batch file's run; what to say of them."""
    results = _load("tokabatch.batch.results")
    with _stop_on_signals("taking away what is unfinished") as stop:
        try:
            with stop.at_once():
                written = results.write_results(out, to, errors)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
    return results.describe(written, to, errors)


def _read_state(out: Path) -> Any:
    found = _load("tokabatch.output.status").read_status(out)
    if found.state == "absent":
        raise OutputError(f"{out}: no run has written here; give the folder that the job names as output.path")
    return found


@contextmanager
def _stop_on_signals(doing: str = "committing what is finished") -> Generator[Interruption, None, None]:
    """Yields what Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask to stop through. The first only asks; a second Ctrl-C ends the
    process. `doing` is what happens then."""
    stop, before = Interruption(), {number: signal.getsignal(number) for number in _SIGNALS}
    seen: list[int] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in seen:
            _say("\x1b[?25h" if os.isatty(2) else "")
            os._exit(EXIT_INTERRUPTED)
        if number not in seen:
            how = "; Ctrl-C again to stop at once" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
            _say(f"stopping: {doing}{how}\n")
        seen.append(number)
        stop.request(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)

    # Only the main thread may set handlers; and another program's, or one that ignores the signal, stays.
    ours = [number for number, handler in before.items() if handler in (signal.default_int_handler, signal.SIG_DFL)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def _stop_after(seconds: float | None) -> Generator[None]:
    """Ask for a stop once so many seconds are over, by a signal: one breaks into what waits."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    """From a signal handler: not `print`, which must not be entered anew where the signal may have struck."""
    TolerantFile(2, stall_seconds=0).write(text.encode())


def _load(module: str) -> Any:
    """The one place that imports late: torch and pyarrow take seconds, and most invocations need neither."""
    return import_module(module)


def _print_result(content: str | tuple[Section, ...]) -> None:
    """Print what a command is for. Raises UsageError where standard output does not take it; where its reader has ended, as
    `head` does, the command ends without a word."""
    _print(content)
    fault = first_fault(sys.stdout)
    if isinstance(fault, BrokenPipeError):
        raise typer.Exit(_READER_ENDED)
    if fault is not None:
        raise UsageError(f"standard output cannot be written: {fault.strerror}")


def _print_note(content: str | tuple[Section, ...]) -> None:
    """Print what is also on disk, or what the exit code says, too: where it cannot be printed, that stays true."""
    _print(content)
    fault = first_fault(sys.stdout)
    if fault is not None and not isinstance(fault, BrokenPipeError):
        print(f"standard output cannot be written: {fault.strerror}", file=sys.stderr)


def _print(content: str | tuple[Section, ...]) -> None:
    if isinstance(content, str):
        print(content)
        return
    render = _load("tokabatch.report.render")
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        _load("rich.console").Console(highlight=False).print(render.tables(content))
    else:
        print(render.plain(content))
