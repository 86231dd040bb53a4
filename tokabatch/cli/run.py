"""The commands that compute samples: `run`, `batch`, and `slurm`, which writes the script that starts `run` on many hosts."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokabatch.cli.arguments import JobArgument, OverridesArgument, OverwriteOption, RepairOption, RetryOption
from tokabatch.cli.folder import write_batch
from tokabatch.cli.job import checked_job, seconds_since_start, starting
from tokabatch.cli.printing import draws_tables, print_message, print_note, print_result
from tokabatch.cli.signals import stop_on_signals
from tokabatch.errors import Stopped, UsageError
from tokabatch.number_text import counted
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.reuse import Reuse

if TYPE_CHECKING:
    from tokabatch.report.summary import RunSummary


def run(
    job: JobArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    repair: RepairOption = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Share the output folder with other processes that run the same job.")
    ] = False,
    units: Annotated[
        int, typer.Option("--units", min=1, help="Number of units into which the first process divides the plan.")
    ] = 256,
    task: Annotated[str, typer.Option("--task", help="Name of this process in `tokabatch status`.")] = "",
    lease: Annotated[
        float,
        typer.Option(
            "--lease", min=0.5, help="Seconds after which others take over the units of a process that no longer responds."
        ),
    ] = 60.0,
    on: Annotated[
        str | None, typer.Option("--on", metavar="ray", help="Run the replicas on a Ray cluster.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, help="As engine.replicas; on Ray, one on each GPU by default.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Address of the Ray cluster; default: RAY_ADDRESS, or this host's.", show_default=False),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Stop after this many seconds, as on SIGTERM.", min=0, show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only messages and the summary.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Add the figures of the scheduler and the engine to the summary.")
    ] = False,
) -> None:
    """Run a job and print its summary.

    The results are Parquet files under OUT/data, which appear during the run. Progress goes to standard error,
    the summary to standard output.

    A run that is in the output folder already is continued: however it ended, the same command computes what is missing.
    Engine settings other than kv_cache_dtype may change, generation.n may be raised and rows added at the end of the
    input. Any other change that affects the output is refused with a list of the differences, unless the run has only
    error rows: then it is started over.

    \b
    Examples
      tokabatch run jobs/quickstart.yaml
      tokabatch run jobs/quickstart.yaml generation.n=4 output.path=out/four
      tokabatch run jobs/quickstart.yaml generation.n=32   16 more of each row
      tokabatch run jobs/quickstart.yaml --overwrite       start over
      tokabatch run jobs/quickstart.yaml --shared          one process of several
      tokabatch run jobs/gsm8k.yaml --on ray               on a Ray cluster
    """
    given = [*(overrides or ()), *((f"engine.replicas={replicas}",) if replicas else ())]
    reuse = Reuse(overwrite, retry_errors, repair)
    early = {"shared": shared, "overwrite": overwrite, "retry_errors": retry_errors}
    with stop_on_signals(deadline=deadline) as stop, checked_job(job, given, **early) as loaded:
        how: dict[str, Any] = {**asdict(reuse), "shared": None}
        if shared:
            reuse.refuse_sharing()
            sharing = import_module("tokabatch.runner.shared")
            how["shared"] = sharing.Shared(task, units, lease)
            if on == "ray":
                raise UsageError(sharing.ONE_WRITER)
        with _cluster(on, address) as how["cluster"]:
            summary = _run(loaded, stop, quiet, **how)
    _print_summary(loaded, summary, verbose)
    raise typer.Exit(summary.exit_code)


def _cluster(kind: str | None, address: str | None) -> AbstractContextManager[Any]:
    """The cluster on which to run; of None, this host. Raises UsageError."""
    if kind is None and address is None:
        return nullcontext()
    if kind is None:
        raise UsageError("--address names a Ray cluster; add --on ray")
    if kind != "ray":
        raise UsageError(f"--on {kind} is not a kind of cluster; write --on ray (for Slurm, see `tokabatch slurm`)")
    try:
        return import_module("tokabatch.cluster.ray").RayCluster(address)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError("--on ray needs Ray; install it with: pip install 'tokabatch[ray]'") from error


def batch(
    requests: Annotated[
        str, typer.Argument(metavar="REQUESTS.jsonl", help="A batch file of OpenAI's API.", show_default=False)
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
        bool, typer.Option("--verbose", "-v", help="Add the figures of the scheduler and the engine to the summary.")
    ] = False,
) -> None:
    """Answer a batch file of OpenAI's API.

    Chat and completions requests in, files of results and errors out. The run is an ordinary one, in the folder
    RESULTS.jsonl.run (output.path): however it ended, the same command computes the missing answers. The files are written
    when all answers are there. MODEL answers, whatever model the requests name.

    \b
    Examples
      tokabatch batch requests.jsonl --model Qwen/Qwen3-0.6B --to results.jsonl
      tokabatch batch in.jsonl --model M --to out.jsonl generation.max_tokens=200
    """
    batches = import_module("tokabatch.batch.job")
    with stop_on_signals() as stop:
        reuse = Reuse(overwrite, retry_errors, repair)
        loaded = batches.batch_job(requests, model, to, errors, overrides or ())
        with batches.said_of_results(loaded, to):
            import_module("tokabatch.precheck").refuse_early(loaded, overwrite=overwrite, retry_errors=retry_errors)
            summary = _run(loaded, stop, quiet, **asdict(reuse))
    _print_summary(loaded, summary, verbose)
    if not summary.pending:
        print_note(write_batch(Path(loaded.output.path), to, errors))
    raise typer.Exit(summary.exit_code)


def slurm(
    job: JobArgument,
    overrides: OverridesArgument = None,
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Number of tasks in the array.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-task", min=0, help="GPUs per task.")] = 0,
    cpus: Annotated[int, typer.Option("--cpus-per-task", min=0, help="CPU cores per task; 0: the site's default.")] = 0,
    limit: Annotated[str, typer.Option("--time", help="Time limit of one start of a task, in sbatch's format.")] = "",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch", metavar="KEY=VALUE", help="Further option of sbatch, such as partition=gpu.", show_default=False
        ),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            "--setup", metavar="LINE", help="Shell command before the run, such as 'module load cuda'.", show_default=False
        ),
    ] = None,
    command: Annotated[
        str, typer.Option("--command", help="Command that starts tokabatch, such as 'apptainer exec --nv IMAGE.sif tokabatch'.")
    ] = "tokabatch",
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="File to write; default: JOB.sbatch.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the script if it is there and differs.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it, too.")] = False,
) -> None:
    """Write the batch script that runs a job on Slurm.

    Each task of the array is `tokabatch run --shared`, which computes units of the plan until none is left: the work is
    balanced, and a task that never starts is not missed. Before its time limit, and when it is preempted, a task commits its
    finished samples and is requeued by the script.

    \b
    Examples
      tokabatch slurm jobs/gsm8k.yaml --tasks 16 --time 4:00:00
      tokabatch slurm jobs/gsm8k.yaml --gpus-per-task 1 --sbatch partition=gpu
      tokabatch slurm jobs/gsm8k.yaml --setup '. venv/bin/activate' --submit
    """
    if limit and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", limit.lower()):
        raise UsageError(f"--time {limit}: write it in sbatch's format, such as 4:00:00 (hours) or 2-12 (days-hours)")
    loaded = import_module("tokabatch.job").Job.load(job, *(overrides or ()))
    loaded.refuse_sharing()
    each = loaded.engine.tensor * loaded.engine.pipeline * (1 if loaded.engine.replicas == "auto" else loaded.engine.replicas)
    if gpus and each > gpus and loaded.engine.device != "cpu":
        raise UsageError(
            f"engine.replicas, tensor and pipeline take {counted(each, 'GPU')} in each task; write --gpus-per-task {each}"
        )
    if (
        not gpus
        and loaded.engine.device != "cpu"
        and not any(each.lstrip("-").startswith(("gpus", "gres")) for each in option or ())
    ):
        print_message("warning: the tasks get no GPU; --gpus-per-task 1 gives each of them one")
    for key, path in (("output.path", loaded.output.path), ("model.path", loaded.model.path)):
        # A model that is no folder here is fetched by each host.
        if Path(gettempdir()) in Path(path).absolute().parents and (key == "output.path" or Path(path).exists()):
            print_message(f"warning: {key} {path}: every host has its own {gettempdir()}; use a shared folder")
    if (Path(loaded.output.path) / "_SUCCESS").exists():
        print_message(f"output.path {loaded.output.path} holds a complete run: the tasks will find nothing to do")
    module, script = import_module("tokabatch.cluster.slurm"), to or Path(f"{job.stem}.sbatch")
    array = module.Array(tasks, gpus, cpus, limit, options=tuple(option or ()), setup=tuple(setup or ()), command=command)
    for warning in module.describe_doubtful(array.options):
        print_message(warning)
    module.write_script(script, module.batch_script(job, tuple(overrides or ()), array, Path.cwd()), overwrite=overwrite)
    print_result(module.submit(script) if submit else f"{script}: submit it with `sbatch {script}`")


def _run(job: Any, stop: Interruption, quiet: bool, **how: Any) -> RunSummary:
    """Run a job with its progress shown; the summary's times count from the start of this process. Exits where it was stopped
    before it began."""
    try:
        with starting(quiet) as progress:
            fresh = "torch" not in sys.modules
            with stop.at_once():
                runner = import_module("tokabatch.runner.run")
            summary: RunSummary = runner.run(job, progress, stop, seconds_before=seconds_since_start(), fresh=fresh, **how)
        return summary
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


def _print_summary(job: Any, summary: RunSummary, verbose: bool) -> None:
    sections = import_module("tokabatch.report.summary").run_sections(summary, verbose)
    closing, out = import_module("tokabatch.report.closing"), Path(job.output.path)
    print_note((*sections, *closing.closing_sections(out, summary)))
    print_note(("" if draws_tables() else "\n") + closing.next_steps(out, summary))
