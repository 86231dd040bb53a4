"""Where a command may write a file about a run: not over the run's own files, and not over what its job reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokabatch.errors import OutputError
from tokabatch.input.files.paths import would_read
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import read_manifest


def check_target(
    folder: OutputFolder, target: Path, suffixes: Sequence[str] = (".jsonl", ".csv", ".parquet"), option: str = "--to"
) -> None:
    """Raise OutputError if a file of the run in `folder` cannot be written there; `option` is the option that names it."""
    if target.suffix not in suffixes:
        listed = " or ".join([", ".join(suffixes[:-1]), suffixes[-1]] if len(suffixes) > 1 else suffixes)
        stream = ", or - for standard output" if len(suffixes) > 1 else ""
        raise OutputError(f"{option} {target}: name a file that ends in {listed}{stream}")
    above = _kind(target.absolute().parent, option)
    if above == "absent":
        raise OutputError(f"{option} {target}: the folder {target.parent} does not exist; create it first")
    if above != "folder":
        raise OutputError(f"{option} {target}: {target.parent} is not a folder")
    kind = _kind(target, option)
    if kind == "folder":
        raise OutputError(f"{option} {target} is a folder; name a file in it")
    if kind == "other":
        raise OutputError(f"{option} {target} is not a regular file, and is not replaced; name another file")
    if folder.data.resolve() in target.resolve().parents:
        raise OutputError(f"{option} {target} lies among the run's own shards; export to another folder")
    if (manifest := read_manifest(folder)) is not None:
        refuse_input(manifest.job, target, option, Path(manifest.working_folder))


def refuse_input(job: Mapping[str, Any], target: Path, option: str, working_folder: Path = Path()) -> None:
    """Raise OutputError if a file written to `target` would replace rows or examples that the job reads, or be read as rows."""
    few_shot = job.get("prompt", {}).get("few_shot") or {}
    for key, path in (("input.path", job["input"]["path"]), ("prompt.few_shot.path", few_shot.get("path"))):
        if path is None:
            continue
        started_in = path if "://" in path else str(working_folder / Path(path).expanduser())
        if would_read(started_in, target, ("jsonl", "parquet")):
            raise OutputError(
                f"{option} {target} is or would be one of the files that the job reads ({key} {path!r}); name a file elsewhere"
            )


def _kind(path: Path, option: str) -> Literal["file", "folder", "other", "absent"]:
    try:
        mode = os.stat(path).st_mode
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    except OSError as error:
        raise OutputError(f"{option} {path} cannot be reached: {error.strerror}; name a file elsewhere") from error
