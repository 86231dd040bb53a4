"""A job as commands take it: refused early, and shown as soon as anything slow begins."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tokabatch.errors import DamageError, InputError, ModelError, UsageError

if TYPE_CHECKING:
    from tokabatch.job import Job
    from tokabatch.report.progress import Progress

_KEY_OF = {ModelError: "model.path", InputError: "input.path"}
"""Where in a job to look for what a message is about that names no key."""


@contextmanager
def checked_job(path: Path, overrides: list[str] | None, **how: bool) -> Generator[Job, None, None]:
    """Return the job of a file and its overrides, refused before anything slow is imported if that can be decided; `how` as
    `precheck.refuse_early` takes it. A refusal from inside is raised with the place where the key it names was written."""
    loaded, written = import_module("tokabatch.job").Job.load_with_places(path, *(overrides or ()))
    try:
        import_module("tokabatch.precheck").refuse_early(loaded, **how)
        yield loaded
    except DamageError:
        raise
    except UsageError as error:
        key = next((key for kind, key in _KEY_OF.items() if isinstance(error, kind)), "")
        raise type(error)(written.locate(str(error), key)) from error


@contextmanager
def starting(quiet: bool) -> Generator[Progress, None, None]:
    """The display of progress, which shows something before anything slow is imported."""
    module = import_module("tokabatch.report.progress")
    with module.open_progress(quiet) as progress:
        progress.update(module.ProgressSnapshot("starting", seconds_since_start()))
        yield progress


def seconds_since_start() -> float:
    """Since this process was started."""
    return max(0.0, time.time() - import_module("psutil").Process().create_time())
