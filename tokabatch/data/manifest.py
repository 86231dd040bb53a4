"""The small files beside the shards: what the run was, how it ended, and the mark that it is complete.

All are JSON, replaced atomically. `summary.json` is the report's document; here it is a mapping to write and read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from tokabatch.data.durable import file_digest
from tokabatch.data.fingerprint import Fingerprint
from tokabatch.data.folder import Claim, OutputFolder
from tokabatch.data.plain_json import to_json
from tokabatch.data.shards import Shard
from tokabatch.errors import OutputError

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True)
class Versions:
    """What computed the output."""

    tokabatch: str
    torch: str
    transformers: str
    python: str
    tokenizers: str = ""
    jinja2: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Written before the first shard, and anew by every run that continues it. `started` is the first one's, ISO 8601 in UTC;
    `job` is the job as resolved, as plain JSON values; `samples` is what the books must close to: the sum of n over `rows`;
    `working_folder` is what the job's relative paths start from."""

    started: str
    working_folder: str
    model_path: str
    versions: Versions
    rows: int
    samples: int
    job: Mapping[str, Any]
    fingerprint: Fingerprint
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Books:
    """Where the samples of a run are."""

    samples: int
    ok: int
    errors: int
    cancelled: int = 0

    @property
    def pending(self) -> int:
        """Samples of which nothing is known yet."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def closed(self) -> bool:
        """Every sample is accounted for, as ok or as an error."""
        return self.samples == self.ok + self.errors


@dataclass(frozen=True, slots=True)
class Success:
    """What OUT/_SUCCESS says: the books, and every file of the output."""

    samples: int
    ok: int
    errors: int
    files: tuple[Shard, ...]


def write_manifest(claim: Claim, manifest: Manifest, given: Mapping[str, Any]) -> None:
    """Write OUT/manifest.json, and OUT/job.json with the job as `given`, which runs it again."""
    claim.write(claim.folder.job, _document(given))
    claim.write(claim.folder.manifest, _document(asdict(manifest)))


def write_summary(claim: Claim, summary: Mapping[str, Any]) -> None:
    """Write OUT/summary.json."""
    claim.write(claim.folder.summary, _document(summary))


def mark_success(claim: Claim, shards: Sequence[Shard], samples: int) -> Books:
    """Write OUT/_SUCCESS, naming every shard with its counts and its digest, if the books close; the caller looks at `closed`.
    Shards without a digest are read for it. Raises OSError."""
    books = Books(samples, sum(shard.ok for shard in shards), sum(shard.errors for shard in shards))
    if books.closed:
        digests = [shard.sha256 or file_digest(claim.folder.path / shard.name) for shard in shards]
        files = [replace(shard, sha256=digest) for shard, digest in zip(shards, digests, strict=True)]
        claim.write(claim.folder.success, _document(asdict(Success(samples, books.ok, books.errors, tuple(files)))))
    return books


def read_success(folder: OutputFolder) -> Success | None:
    """OUT/_SUCCESS, or None where the run is not complete. Raises OutputError where it is damaged."""
    document = _read(folder.success)
    if document is None:
        return None
    try:
        files = tuple(Shard(**file) for file in document["files"])
        return Success(**cast("dict[str, Any]", {**document, "files": files}))
    except (KeyError, TypeError) as error:
        raise OutputError(
            f"{folder.success} is not one of this version ({error}). Remove it and run the same command again, which writes it."
        ) from error


def read_manifest(folder: OutputFolder) -> Manifest | None:
    """OUT/manifest.json, or None where there is none. Raises OutputError where it is damaged."""
    document = _read(folder.manifest)
    if document is None:
        return None
    try:
        versions, fingerprint = Versions(**document["versions"]), Fingerprint(**document["fingerprint"])
        return Manifest(**cast("dict[str, Any]", {**document, "versions": versions, "fingerprint": fingerprint}))
    except (KeyError, TypeError) as error:
        raise OutputError(
            f"{folder.manifest} is not a manifest of this version ({error}). "
            "Read the shards under data/ directly, use the version that wrote them, or start afresh with --overwrite."
        ) from error


def read_summary(folder: OutputFolder) -> dict[str, Any]:
    """OUT/summary.json; empty where there is none."""
    return _read(folder.summary) or {}


def _document(value: Mapping[str, Any]) -> bytes:
    return (to_json(value, indent=2) + "\n").encode()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}). Remove it, or restore it from a copy.") from error
    if not isinstance(document, dict):
        raise OutputError(f"{path} holds no JSON object. Remove it, or restore it from a copy.")
    return cast("dict[str, Any]", document)
