"""The job that answers a batch file, and where its results go."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokabatch.errors import CommitError, OutputError, UsageError
from tokabatch.job import Job
from tokabatch.output.export_target import check_target, refuse_input
from tokabatch.output.folder import OutputFolder


def batch_job(requests: str, model: str, results: Path, errors: Path | None = None, overrides: Sequence[str] = ()) -> Job:
    """The job that answers the requests in a file with a model; its run is kept beside the results, `results.jsonl.run`. Any
    key may be overridden, as in a job file. Raises JobError, and OutputError where the results could not be written in the
    end."""
    given = {
        "model": {"path": model},
        "input": {"path": requests, "format": "openai"},
        "output": {"path": str(_run_folder(results))},
    }
    job = Job.load(given, *overrides)
    check_targets(OutputFolder(Path(job.output.path)), results, errors or errors_file(results))
    for option, target in (("--to", results), ("--errors", errors or errors_file(results))):
        refuse_input(job.given(), target, option)
    return job


@contextmanager
def said_of_results(job: Job, results: Path) -> Generator[None]:
    """Raise what is wrong with the folder of the run in terms of the option that names it, unless a key does."""
    try:
        yield
    except (UsageError, CommitError) as error:
        if Path(job.output.path) != _run_folder(results):
            raise
        said = str(error).replace("another output.path", "another --to").replace("output.path ", "the run's folder ")
        raise type(error)(said) from error


def errors_file(results: Path) -> Path:
    """Where the errors go unless another file is named: `results.errors.jsonl` beside `results.jsonl`."""
    return results.with_name(f"{results.stem}.errors{results.suffix}")


def _run_folder(results: Path) -> Path:
    return results.with_name(f"{results.name}.run")


def check_targets(folder: OutputFolder, results: Path, errors: Path) -> None:
    """Raises OutputError where the files of the run in `folder` cannot be written there."""
    for option, target in (("--to", results), ("--errors", errors)):
        check_target(folder, target, (".jsonl",), option)
    if results.absolute() == errors.absolute():
        raise OutputError(f"--errors {errors} is the file of the results; name another one")
