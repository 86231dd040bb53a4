"""From a path of the job to an ordered list of files: a file, a folder, a glob or an fsspec URL.

Folders are read recursively; names that begin with `.` or `_` are bookkeeping of other tools, not data. Formats are told apart
by extension only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from tokabatch.errors import InputError
from tokabatch.job.names_elsewhere import hub_dataset

COMPRESSIONS = (".gz", ".zst")
GLOB_CHARACTERS = "*?["
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}
"""The package that fsspec needs for a URL, by its scheme."""
ADVICE = {
    "json": "rename it to .jsonl if it holds one object a line; an array becomes that with: jq -c '.[]' data.json > data.jsonl",
    **dict.fromkeys(("ndjson", "jsonlines", "jl"), "rename it to .jsonl"),
    **dict.fromkeys(("pq", "parq"), "rename it to .parquet"),
    "feather": "convert it, for example with pandas.read_feather(...).to_parquet(...)",
    **dict.fromkeys(("pkl", "pickle"), "convert it, for example with pandas.read_pickle(...).to_parquet(...)"),
    "": "if it holds one JSON object a line, rename it to .jsonl",
    "csv": "convert it to Parquet or JSON Lines, for example with pandas.read_csv(...).to_parquet(...)",
    "tsv": "convert it to Parquet or JSON Lines, for example with pandas.read_csv(..., sep='\\t').to_parquet(...)",
    "txt": 'write one JSON object a line, for example {"prompt": "..."}, into a .jsonl file',
    "arrow": "convert it, for example with datasets.load_from_disk(FOLDER).to_parquet(FILE), or pandas.read_feather(...)",
    "bz2": "decompress it with bunzip2, or compress it with zstd instead",
    "xz": "decompress it with unxz, or compress it with zstd instead",
    "zip": "unpack it with unzip",
    "xlsx": "convert it, for example with pandas.read_excel(...).to_parquet(...), which needs the package openpyxl",
}
"""What to do with a file that cannot be read, by its extension."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input. `path` is the name in its file system."""

    fs: AbstractFileSystem
    path: str

    def open(self) -> IO[bytes]:
        try:
            return cast("IO[bytes]", self.fs.open(self.path, "rb"))
        except Exception as error:  # see `refuse_unreachable`
            refuse_unreachable(self.path, error)

    @property
    def shown(self) -> str:
        """The name in messages: relative to the working directory if the file is below it."""
        below = f"{os.getcwd()}/"
        return self.path.removeprefix(below) if isinstance(self.fs, LocalFileSystem) else self.path

    @property
    def size(self) -> int:
        """Size in bytes; -1 if the file system does not report it."""
        try:
            size = cast("int | None", self.fs.size(self.path))
        except Exception as error:  # see `refuse_unreachable`
            refuse_unreachable(self.path, error)
        return -1 if size is None else size

    @property
    def compression(self) -> str:
        """`.gz`, `.zst`, or the empty string, whatever the case of the name's letters."""
        return next((suffix for suffix in COMPRESSIONS if self.path.lower().endswith(suffix)), "")

    @property
    def format(self) -> str:
        """The extension below any compression, in lower case without its dot: `jsonl` for `a.jsonl.gz`."""
        name = self.path.rsplit("/", 1)[-1].lower().removesuffix(self.compression)
        return name.rsplit(".", 1)[-1] if "." in name else ""


def find_files(path: str, formats: Collection[str], key: str) -> tuple[str, tuple[InputFile, ...]]:
    """Return the one format of the input and its files, sorted by path. Raises InputError naming `key` of the job, the path and
    the remedy."""
    place = f"{key} {path!r}"
    if path.startswith("hf://") and not path.startswith("hf://datasets/"):
        raise InputError(f"{place} is not a hub dataset; write hf://datasets/OWNER/NAME")
    if page := re.fullmatch(
        r"https?://(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)(/blob/.*|/viewer.*|/tree.*|/?)", path
    ):
        meant = path.replace("/blob/", "/resolve/", 1) if page[2].startswith("/blob/") else f"hf://datasets/{page[1]}"
        raise InputError(f"{place} is a web page; write {meant}")
    try:
        fs, root = cast("tuple[AbstractFileSystem, str]", url_to_fs(path))
    except ImportError as error:
        package = _PACKAGES.get(path.partition("://")[0])
        remedy = f"; `pip install {package}`" if package else ""
        raise InputError(f"{place} needs another package: {error}{remedy}") from error
    except ValueError as error:
        raise InputError(f"{place} is not a URL that fsspec knows: {error}") from error
    except Exception as error:  # see `refuse_unreachable`
        refuse_unreachable(place, error)
    try:
        files = _list(fs, path, place, root, formats)
    except InputError:
        raise
    except Exception as error:  # see `refuse_unreachable`
        refuse_unreachable(place, error)
    found = sorted({file.format for file in files})
    unknown = [file for file in files if file.format not in formats]
    if unknown:
        advice = ADVICE.get(unknown[0].format, "convert it, or give the file its right extension")
        kinds = f"{_spell(formats)}; .jsonl also as .jsonl.gz and .jsonl.zst"
        raise InputError(f"{unknown[0].path} is not a format that can be read ({kinds}): {advice}")
    if len(found) > 1:
        raise InputError(
            f"{place} mixes {' and '.join(found)} files; name one kind, for example {path.rstrip('/')}/*.{found[0]}"
            if not _is_glob(root)
            else f"{place} mixes {' and '.join(found)} files; narrow the pattern to one kind"
        )
    return found[0], tuple(files)


def would_read(path: str, target: Path, formats: Collection[str]) -> bool:
    """Return whether a job with this path reads the file `target`, or would read it if it existed. Only local paths do."""
    if "://" in path and not path.startswith("file://"):
        return False
    fs, root = cast("tuple[AbstractFileSystem, str]", url_to_fs(path))
    root = os.path.normpath(root)
    if _is_glob(root):
        pattern = re.compile(glob_translate(root))
        known = any(pattern.match(name) for name in {os.path.abspath(target), str(target.resolve())})
        return known or any(Path(name).resolve() == target.resolve() for name in cast("list[str]", fs.glob(root)))
    place, given = target.resolve(), Path(root).resolve()
    if given not in place.parents:
        return given == place
    below = place.relative_to(given).parts
    return InputFile(fs, str(place)).format in formats and not any(part[:1] in (".", "_") for part in below)


def refuse_unreachable(place: str, error: Exception) -> NoReturn:
    """Raise InputError for a file or folder that cannot be reached. Callers catch Exception: each of fsspec's file systems
    raises errors of its own (mostly those of its HTTP client), and the hub's client has changed its package before."""
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    remedy = "Check that it exists and can be read"
    if not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        remedy += "; if it lies on a server out of reach, fetch it elsewhere and name the local copy"
    raise InputError(f"{place} cannot be read: {reason}. {remedy}.") from error


def _list(fs: AbstractFileSystem, path: str, place: str, root: str, formats: Collection[str]) -> list[InputFile]:
    if fs.isfile(root):
        return [InputFile(fs, root)]
    if fs.isdir(root):
        found = cast("list[str]", fs.find(root))
        parts = {name: name.removeprefix(root.rstrip("/")).split("/") for name in sorted(found)}
        files = [InputFile(fs, name) for name in parts if not any(part[:1] in (".", "_") for part in parts[name] if part)]
        known = [file for file in files if file.format in formats]
        if not known:
            seen = ", ".join(file.path.rsplit("/", 1)[-1] for file in files[:5]) or "nothing"
            advice = next((ADVICE[file.format] for file in files if file.format in ADVICE), "check the path")
            raise InputError(f"{place} is a folder that holds no {_spell(formats)} file (it holds {seen}); {advice}")
        return known
    if _is_glob(root):
        matches = cast("dict[str, dict[str, Any]]", fs.glob(root, detail=True))
        wants_dots = root.rsplit("/", 1)[-1].startswith(".")
        names = [name for name in sorted(matches) if wants_dots or not name.rsplit("/", 1)[-1].startswith(".")]
        files = [InputFile(fs, name) for name in names if matches[name].get("type") == "file"]
        if not files:
            raise InputError(f"{place} matches no file; check the pattern, and the folder you run in: {Path.cwd()}")
        return files
    if fs.exists(root):
        raise InputError(f"{place} is neither a file nor a folder; write what it yields to a file and name that")
    names = [item.name for item in Path(root).parent.iterdir()] if Path(root).parent.is_dir() else []
    meant = get_close_matches(Path(root).name, names, n=1, cutoff=0.85)
    near = f"; did you mean {Path(path).with_name(meant[0])}?" if meant else ""
    there = next((each for each in Path(path).parents if each.exists()), None)
    start = "; check the path" + (f": only {there} of it exists" if there and there.name else "")
    if "://" in path:
        parts = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)/([\w-]+)/?", path)
        is_subset = (
            f". If {parts[2]} is a subset, write {hub_dataset(parts[1])}" if parts and place.startswith("input.") else ""
        )
        start = f" or cannot be reached; check the URL{is_subset}"
    elif not Path(path).is_absolute():
        start = f"; relative paths start from the folder you run in, {Path.cwd()}"
    if not near and re.fullmatch(r"[\w.-]+/[\w-]+", path) and not Path(path).parent.is_dir():
        near = f"{start}; a dataset of the hub is written {hub_dataset(path)}"
    raise InputError(f"{place} does not exist{near or start}")


def _is_glob(path: str) -> bool:
    return any(character in path for character in GLOB_CHARACTERS)


def _spell(formats: Collection[str]) -> str:
    return " or ".join(f".{name}" for name in sorted(formats))
