"""All commands, in the order of the help; how the program starts and ends, and the exit status of an error."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

from tokabatch import __version__
from tokabatch.cli.arguments import Command, Group
from tokabatch.cli.folder import check, errors, export, report, score, status, verify
from tokabatch.cli.plan import keys, plan, profile
from tokabatch.cli.printing import print_message, print_result
from tokabatch.cli.run import batch, run, slurm
from tokabatch.cli.serve import download, ping, serve
from tokabatch.errors import JobError, TokabatchError
from tokabatch.report.streams import make_tolerant

_HELP = """Offline batch inference: complete every row of a dataset with a language model, each row n times.

A job file says what to do; any key of it can be overridden on the command line. The job is checked and planned
before the weights load, the results are Parquet files in the job's output folder.

\b
Examples
  tokabatch plan jobs/quickstart.yaml                check it, show its size
  tokabatch run jobs/quickstart.yaml                 run it, or continue it
  tokabatch run jobs/quickstart.yaml generation.n=4  with one key changed
  tokabatch status out/quickstart                    how far a run is
  tokabatch errors out/quickstart                    its error rows, and why
  tokabatch export out/quickstart --to all.jsonl     all samples in one file
  tokabatch report out/quickstart                    an HTML page about it
  tokabatch score out/quickstart verify.kind=exact   judge the samples again
  tokabatch check out/quickstart                     read every file back
  tokabatch keys generation                          the keys of a section
  tokabatch serve jobs/quickstart                    serve OpenAI's API

\b
Exit codes
  0    complete
  1    internal error
  2    the command line, the job, a file it names or the output folder is
       wrong; the message says what, and what to do about it
  3    complete, but with more errors than errors.max_fraction allows, or
       without any verdict (verify)
  4    a committed file is damaged or missing (the message names it, and the
       command that computes it again), or the sample counts do not add up,
       which is a bug (please report it)
  75   stopped (SIGTERM, SIGHUP, SIGUSR1, disk full, errors.policy=stop); what
       was finished is committed, the same command continues from there
  130  interrupted (Ctrl-C); as 75
"""

app = typer.Typer(
    cls=Group,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for _command in (
    *(run, batch, slurm, plan, keys, profile, status, errors, report, check, score, export),
    *(download, serve, ping),
):
    app.command(cls=Command)(_command)
app.command(cls=Command, hidden=True)(verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_result(f"tokabatch {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before a command."""


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
    finally:
        if status:
            # All is done; in what libraries do at exit, an interrupt would print a traceback.
            signal.signal(signal.SIGINT, lambda *_: leave())


def main() -> None:
    """The command line. An error of ours ends in one message and its exit code; anything unforeseen in its traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    make_tolerant()
    try:
        app()
    except TokabatchError as error:
        several = isinstance(error, JobError) and "\n" in str(error)
        print_message(f"errors:\n{error}" if several else f"error: {error}")
        sys.exit(error.exit_code)
