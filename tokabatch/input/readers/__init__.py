"""The input's readers. A reader is one file in this folder, named after the extension that it reads.

A file `readers/<extension>.py` reads files of that extension through its `open_files(name, files) -> Reader`. `hub.py` reads
`hf://datasets/org/name` through its `open_dataset`. To add a format, add a file; it is imported only when it is used.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from tokabatch.errors import InputError
from tokabatch.input.files.paths import find_files
from tokabatch.input.rows import Reader
from tokabatch.job import InputConfig

HUB = "hub"
HUB_SCHEME = "hf://datasets/"


def open_reader(config: InputConfig) -> Reader:
    """Return the reader of the job's input. `subset` and `split` select nothing among files, so that one job can be pointed at
    a local copy of one split by overriding `input.path` alone; a copy that also holds others is refused. `limit` is applied by
    the caller."""
    path = config.path
    if _is_hub_dataset(path):
        return importlib.import_module(f"{__name__}.{HUB}").open_dataset(path, config.subset, config.split)
    for key, part, files in _of_hub_alone(config):
        above = len(os.path.commonpath(files))
        others = [file for file in files if not _names(file, part, above)]
        if 0 < len(others) < len(files):
            raise InputError(
                f"input.path {path!r} holds more than the {key} {part!r}, and input.{key} selects nothing among files: "
                f"{others[0]} would be read, too. Name only the files to read, for example by a pattern"
            )
    return open_path(path)


def describe_unused(config: InputConfig) -> tuple[str, ...]:
    """Return a note if there is a `split`, but the input is files, and neither one of them nor its folder is named after it. A
    local copy of one split seldom has the name of its `subset`."""
    return tuple(
        f"warning: input.{key} is {part!r}, but selects rows of a hub dataset alone (hf://datasets/OWNER/NAME): input.path "
        f"{config.path!r} is read as a whole"
        for key, part, files in _of_hub_alone(config)
        if key == "split" and not any(_names("/".join(file.split("/")[-2:]), part) for file in files)
    )


def _of_hub_alone(config: InputConfig) -> Iterator[tuple[str, str, list[str]]]:
    """Iterate over those of the keys `subset` and `split` that are given, with their value and the files; none for a dataset of
    the hub."""
    for key, part in (("subset", config.subset), ("split", config.split)):
        if part and not _is_hub_dataset(config.path):
            yield key, part, [file.path for file in find_files(config.path, formats(), "input.path")[1]]


def _names(file: str, part: str, above: int = 0) -> bool:
    """Return whether a file's path has the name of a subset or split in it, behind its first `above` characters."""
    # A split's name may itself hold a dot or an underscore: `train_sft-00000-of-00002.parquet`.
    return re.compile(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])").search(file, above) is not None


def open_path(path: str, key: str = "input.path") -> Reader:
    """Return the reader of a file, folder, glob or fsspec URL; `key` is the job's key that holds the path."""
    if _is_hub_dataset(path):
        example = f"{path.rstrip('/')}/data/FILE.parquet"
        raise InputError(f"{key} {path!r} is a whole hub dataset; name one file of it, such as {example}")
    kind, files = find_files(path, formats(), key)
    return importlib.import_module(f"{__name__}.{kind}").open_files(path, files)


def is_of_files(config: InputConfig, kind: str) -> bool:
    """Return whether the input is files of one format, named by its extension. Raises InputError if there are none."""
    return not _is_hub_dataset(config.path) and find_files(config.path, formats(), "input.path")[0] == kind


def list_files(config: InputConfig) -> dict[str, int]:
    """Return the size in bytes of each input file by its path; empty for a hub dataset, -1 if a server does not report it."""
    if _is_hub_dataset(config.path):
        return {}
    _, files = find_files(config.path, formats(), "input.path")
    return {file.path: file.size for file in files}


def list_local_files(config: InputConfig) -> tuple[Path, ...] | None:
    """Return the input's files in order; None if they are not on this machine's own file system."""
    if _is_hub_dataset(config.path):
        return None
    _, files = find_files(config.path, formats(), "input.path")
    if not all(isinstance(file.fs, LocalFileSystem) for file in files):
        return None
    return tuple(Path(file.path) for file in files)


def formats() -> tuple[str, ...]:
    """Return the file extensions that can be read."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != HUB)


def _is_hub_dataset(path: str) -> bool:
    """Return whether a path is a whole dataset, not a file inside its repository."""
    return path.startswith(HUB_SCHEME) and path.removeprefix(HUB_SCHEME).strip("/").count("/") <= 1
