"""The small files beside the shards: what the run was, how it ended, and the mark that it is complete.

All are JSON, replaced atomically. `summary.json` is the report's document; here it is a mapping to write and read. The manifest
and `_SUCCESS` carry a digest of themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tokabatch.errors import DamageError
from tokabatch.input.fingerprint import Fingerprint, is_of_verify
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.journal import Shard
from tokabatch.output.plain_json import to_json
from tokabatch.storage.atomic_files import NewFile, publish
from tokabatch.storage.listing import read_bytes

SCHEMA_VERSION = 3
RUN_KEY, FINGERPRINT_KEY, VERIFIER_KEY = b"tokabatch.run", b"tokabatch.fingerprint", b"tokabatch.verifier"
"""In a shard's metadata: which run it is of, the digest of the settings that its first start had, and the digest of what its
verdicts follow from."""
_DIGEST = "sha256"


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
    """Written before the first shard, and again by every run that continues it. `started` is the first one's, ISO 8601 in the
    local time of then, which templates see at every start;
    `job` is the job as resolved, as plain JSON values; `samples` is what the books must close to: the sum of n over `rows`;
    `working_folder` is what the job's relative paths start from. `run` and `fingerprint_sha256` are the first start's, too, and
    empty in a run of a version that had neither these nor a record of commits; `job_sha256` is that of OUT/job.json."""

    started: str
    working_folder: str
    model_path: str
    versions: Versions
    rows: int
    samples: int
    job: Mapping[str, Any]
    fingerprint: Fingerprint
    schema_version: int = SCHEMA_VERSION
    run: str = ""
    fingerprint_sha256: str = ""
    job_sha256: str = field(default="", compare=False)
    units: int = 0
    """Where several processes write: into how many units the plan is cut; `units_sha256` is the digest of which."""
    units_sha256: str = ""

    @property
    def identity(self) -> dict[bytes, bytes]:
        """What each shard says of its run."""
        return {RUN_KEY: self.run.encode(), FINGERPRINT_KEY: self.fingerprint_sha256.encode()}

    @property
    def marks(self) -> dict[bytes, bytes]:
        """What is written into each shard: the same, and by what its samples are judged."""
        verify = sorted(item for item in self.fingerprint.settings.items() if is_of_verify(item[0]))
        return {**self.identity, VERIFIER_KEY: hashlib.sha256(to_json(verify).encode()).hexdigest().encode() if verify else b""}


@dataclass(frozen=True, slots=True)
class Books:
    """Where the samples of a run are."""

    samples: int
    ok: int
    errors: int
    cancelled: int = 0
    unjudged: int = 0
    """Of these, the samples whose verdicts are still to come."""

    @property
    def pending(self) -> int:
        """Samples of which nothing is known yet."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def closed(self) -> bool:
        """Every sample is accounted for, as ok, as an error or as cancelled, and judged."""
        return self.samples == self.ok + self.errors + self.cancelled and not self.unjudged

    @classmethod
    def of(cls, samples: int, shards: Sequence[Shard]) -> Books:
        """Of so many samples in all, those in the shards."""
        columns = ((shard.ok, shard.errors, shard.cancelled, shard.unjudged) for shard in shards)
        return cls(samples, *map(sum, zip((0, 0, 0, 0), *columns, strict=True)))


@dataclass(frozen=True, slots=True)
class Success:
    """What OUT/_SUCCESS says: the books, and every file of the output."""

    samples: int
    ok: int
    errors: int
    files: tuple[Shard, ...]
    cancelled: int = 0


def settings_digest(fingerprint: Fingerprint) -> str:
    """SHA-256 of what decides a sample, whatever rows there are."""
    return hashlib.sha256(to_json(sorted(fingerprint.settings.items())).encode()).hexdigest()


def write_manifest(claim: Claim, manifest: Manifest, given: Mapping[str, Any]) -> None:
    """Write OUT/manifest.json, and OUT/job.json with the job as `given`, which runs it again. One of several writers raises
    FileExistsError where there is a manifest."""
    job, files, folder = _document(given), claim.files, claim.folder
    claim.write(folder.job, job, keep=True)
    sealed = _sealed(asdict(replace(manifest, job_sha256=hashlib.sha256(job).hexdigest())))
    if files.alone:
        claim.write(folder.manifest, sealed, keep=True)
        return
    temporary = folder.temporary / folder.manifest.name
    with NewFile(files, temporary) as file:
        file.write(sealed)
        file.sync()
    publish(files, temporary, folder.manifest)


def job_is_whole(folder: OutputFolder, manifest: Manifest) -> bool:
    """Whether OUT/job.json is there as it was written. Raises OutputError where it cannot be read."""
    content = read_bytes(folder.files, folder.job)
    return content is not None and manifest.job_sha256 in ("", hashlib.sha256(content).hexdigest())


def read_job(folder: OutputFolder, manifest: Manifest) -> dict[str, Any]:
    """The job that OUT/job.json holds. Raises DamageError where that is missing or changed."""
    content = read_bytes(folder.files, folder.job)
    if content is None or not job_is_whole(folder, manifest):
        raise DamageError(f"{folder.job} is missing or changed. Run the same job again, which writes it.")
    job: dict[str, Any] = json.loads(content)
    return job


def write_summary(claim: Claim, summary: Mapping[str, Any]) -> None:
    """Write OUT/summary.json, unless it is there like that."""
    document = _document(summary)
    if read_bytes(claim.files, claim.folder.summary) != document:
        claim.write(claim.folder.summary, document)


def mark_success(claim: Claim, shards: Sequence[Shard], samples: int) -> Books:
    """Write OUT/_SUCCESS, naming every shard with its counts and its digest, if the books close; the caller looks at `closed`.
    Nothing is written where it says so already. Digests are those of the commits. Raises OSError, and whatever
    `Claim.check_folder` does."""
    books = Books.of(samples, shards)
    if books.closed:
        claim.check_lock()
        claim.check_folder()
        known = claim.journal.shards if claim.journal is not None else {}
        files = tuple(known[shard.name][0] if shard.name in known else shard for shard in shards)
        success = Success(samples, books.ok, books.errors, files, books.cancelled)
        said = None
        with suppress(DamageError):
            said = read_success(claim.folder)
        if said != success:
            claim.write(claim.folder.success, _sealed(asdict(success)))
    return books


def read_success(folder: OutputFolder) -> Success | None:
    """OUT/_SUCCESS, or None where the run is not complete. Raises DamageError where it is damaged."""
    document = _read(folder, folder.success, "Run the same command again, which writes it.")
    if document is None:
        return None
    try:
        files = tuple(Shard(**file) for file in document["files"])
        return Success(**cast("dict[str, Any]", {**document, "files": files}))
    except (KeyError, TypeError) as error:
        raise DamageError(
            f"{folder.success} is not one of this version ({error}). Run the same command again, which writes it."
        ) from error


def read_manifest(folder: OutputFolder) -> Manifest | None:
    """OUT/manifest.json, or None where there is none. Raises DamageError where it is damaged."""
    document = _read(folder, folder.manifest, "Restore it from a copy, or start over with --overwrite.")
    if document is None:
        return None
    try:
        versions, fingerprint = Versions(**document["versions"]), Fingerprint(**document["fingerprint"])
        return Manifest(**cast("dict[str, Any]", {**document, "versions": versions, "fingerprint": fingerprint}))
    except (KeyError, TypeError) as error:
        raise DamageError(
            f"{folder.manifest} is not a manifest of this version ({error}). "
            "Read the shards under data/ directly, use the version that wrote them, or start over with --overwrite."
        ) from error


def read_summary(folder: OutputFolder) -> dict[str, Any]:
    """OUT/summary.json; empty where there is none. Raises DamageError where it is damaged."""
    return _read(folder, folder.summary, "Run the same command again, which writes it.") or {}


def _document(value: Mapping[str, Any]) -> bytes:
    # A file name need not be text; what of it is none is escaped, as JSON has it.
    return (to_json(value, indent=2) + "\n").encode(errors="backslashreplace")


def _sealed(value: Mapping[str, Any]) -> bytes:
    return _document({**value, _DIGEST: _digest(value)})


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_document(value)).hexdigest()


def _read(folder: OutputFolder, path: Path, remedy: str) -> dict[str, Any] | None:
    content = read_bytes(folder.files, path)
    if content is None:
        return None
    try:
        document = json.loads(content)
    except ValueError as error:
        raise DamageError(f"{path} is damaged: it cannot be read as JSON ({error}). {remedy}") from error
    if not isinstance(document, dict):
        raise DamageError(f"{path} is damaged: it holds no JSON object. {remedy}")
    found = cast("dict[str, Any]", document)
    digest = found.pop(_DIGEST, None)
    if digest is not None and digest != _digest(found):
        raise DamageError(f"{path} is damaged: it is not what the run wrote. {remedy}")
    return found
