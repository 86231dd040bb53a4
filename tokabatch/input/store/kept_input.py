"""The tokenised input of an unfinished run, kept in its folder so that the next start need not make it again.

OUT/_input holds the files of an `InputStore` and `index.json`, which records what they were made of and by, and the SHA-256 of
each. A start reuses them if all of that is identical, and otherwise tokenises the input's own files again. Nothing here has to
survive a crash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from tokabatch import __version__
from tokabatch.input.fingerprint import WEIGHTS, Fingerprint
from tokabatch.input.prompts.builder import Limits
from tokabatch.input.readers import list_local_files
from tokabatch.input.store.tokenized_input import InputStore
from tokabatch.job import GenerationConfig, Job
from tokabatch.storage.atomic_files import DurableFiles, stream_digest

INDEX = "index.json"
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tokenised input is made of: `settings`, and the content of `files`; `marks` reveal a file that was written to
    while it was read."""

    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    marks: tuple[tuple[int, ...], ...]

    def unchanged(self) -> bool:
        """Return whether the files were left unchanged since."""
        return _marks(self.files) == self.marks


def describe_origin(
    job: Job, fingerprint: Fingerprint, generation: GenerationConfig, limits: Limits, clock: str
) -> Origin | None:
    """Describe what the job's tokenised input is made of. None for an input that is remote or read in part: comparing it would
    take as long as reading it."""
    files = list_local_files(job.input)
    if files is None or not can_be_kept(job):
        return None
    settings: dict[str, Any] = {
        "fingerprint": {name: text for name, text in fingerprint.settings.items() if not name.endswith(WEIGHTS[1:])},
        "input": job.input.model_dump(mode="json"),
        "output": job.output.model_dump(mode="json", include={"columns"}),
        "verify": None if job.verify is None else job.verify.model_dump(mode="json"),
        "prompt": job.prompt.model_dump(mode="json"),
        "generation": generation.model_dump(mode="json"),
        "context_length": limits.context_length,
        "vocab_size": limits.vocab_size,
        "clock": clock,
        "versions": {"tokabatch": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    return Origin(settings, files, _marks(files))


def can_be_kept(job: Job) -> bool:
    """Return whether the tokenised input of this job can be kept at all."""
    return list_local_files(job.input) is not None and job.input.limit is None


def keep_input(store: InputStore, origin: Origin | None, files: DurableFiles, folder: Path, kept: Path) -> None:
    """Move the files of the finished `store` from `folder` to `kept`, replacing what is there. Without an origin, or if the
    move fails, nothing is kept."""
    with suppress(OSError):
        files.remove_tree(kept)
        if origin is None:
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            document = {
                "settings": origin.settings,
                "input": _digests(pool, origin.files),
                "files": _digests(pool, sorted(folder.iterdir())),
                "store": store.state(),
            }
        if origin.unchanged():
            text = json.dumps(document).encode()
            (folder / INDEX).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
            files.replace(folder, kept)


def load_kept(folder: Path, origin: Origin) -> InputStore | None:
    """Load the input kept in `folder`; None if there is none of this origin, or if a byte of it has changed."""
    try:
        digest, _, text = (folder / INDEX).read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return None
        document = cast("dict[str, Any]", json.loads(text))
        if document["settings"] != origin.settings:
            return None
        files = [folder / Path(name).name for name in document["files"]]
        with ThreadPoolExecutor(_THREADS) as pool:
            if not (_same(pool, origin.files, document["input"]) and _same(pool, files, document["files"])):
                return None
        return InputStore.restored(folder, document["store"]) if origin.unchanged() else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _same(pool: ThreadPoolExecutor, files: Sequence[Path], expected: Mapping[str, list[Any]]) -> bool:
    sizes = {str(path): path.stat().st_size for path in files}
    if list(sizes.values()) != [size for size, _ in expected.values()]:
        return False
    return list(_digests(pool, files).values()) == list(expected.values())


def _digests(pool: ThreadPoolExecutor, files: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the size and SHA-256 of each file."""
    sums = pool.map(_digest, files)
    return {str(path): [path.stat().st_size, digest] for path, digest in zip(files, sums, strict=True)}


def _digest(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return stream_digest(file)


def _marks(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    stats = [path.stat() for path in files]
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in stats)
