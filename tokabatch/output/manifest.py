"""The small files beside the shards: what the run was, how it ended, and the mark that it is complete.

All are JSON, replaced atomically. `summary.json` belongs to the report; here it is any mapping. The manifest and `_SUCCESS`
carry a digest of themselves.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from tokabatch import __version__
from tokabatch.errors import DamageError, ForeignFileError, OutputError
from tokabatch.input.fingerprint import Fingerprint, is_of_verify
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.foreign_files import RUN_KEY, has_manifest, is_manifest
from tokabatch.output.journal import Shard
from tokabatch.output.plain_json import to_document, to_json
from tokabatch.storage.atomic_files import NewFile, publish
from tokabatch.storage.listing import is_there, read_bytes

SCHEMA_VERSION = 3
FINGERPRINT_KEY, VERIFIER_KEY = b"tokabatch.fingerprint", b"tokabatch.verifier"
"""Further keys of a shard's metadata: the digest of the settings of the run's first start, and the digest of what its verdicts
depend on."""
_DIGEST = "sha256"


@dataclass(frozen=True, slots=True)
class Versions:
    """The software and hardware that computed the output."""

    tokabatch: str
    torch: str
    transformers: str
    python: str
    tokenizers: str = ""
    jinja2: str = ""


def versions_here() -> Versions:
    """Return those of this process. None of the libraries is imported for it."""
    names = ("torch", "transformers", "tokenizers", "jinja2")
    return Versions(tokabatch=__version__, python=platform.python_version(), **{name: version(name) for name in names})


@dataclass(frozen=True, slots=True)
class Manifest:
    """Written before the first shard, and again by every start that continues the run. `started` is the time of the first
    start, ISO 8601 in its local time, which templates see at every start; `job` is the job as resolved, as plain JSON values;
    `samples` is the total that must be accounted for: the sum of n over `rows`; `working_folder` is what the job's relative
    paths start from. `run` and `fingerprint_sha256` are the first start's, too; they are empty in runs of versions without them
    or without a record of commits. `job_sha256` is that of OUT/job.json."""

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
    """For several writers, the number of units that the plan is cut into; `units_sha256` is the digest of the plan."""
    units_sha256: str = ""

    @property
    def identity(self) -> dict[bytes, bytes]:
        """What each shard says of its run."""
        return {RUN_KEY: self.run.encode(), FINGERPRINT_KEY: self.fingerprint_sha256.encode()}

    @property
    def id_column(self) -> str | None:
        """The input's column that identifies rows; None if their numbers do."""
        return json.loads(self.fingerprint.settings.get("input.id_column", "null"))

    def is_judge_of(self, metadata: Mapping[bytes, bytes] | None) -> bool:
        """Return whether the verdicts in a shard with this metadata are of this manifest's judge, as those of versions that did
        not name it are. They are of another one after an interrupted `tokabatch score`."""
        return (metadata or {}).get(VERIFIER_KEY) in (None, self.marks[VERIFIER_KEY])

    @property
    def marks(self) -> dict[bytes, bytes]:
        """The metadata of each shard: `identity`, and what its samples are judged by."""
        verify = sorted(item for item in self.fingerprint.settings.items() if is_of_verify(item[0]))
        return {**self.identity, VERIFIER_KEY: hashlib.sha256(to_json(verify).encode()).hexdigest().encode() if verify else b""}


@dataclass(frozen=True, slots=True)
class Books:
    """How many of a run's samples are where."""

    samples: int
    ok: int
    errors: int
    cancelled: int = 0
    unjudged: int = 0
    """Of these, the samples that are still to be judged."""

    @property
    def pending(self) -> int:
        """Samples that are not accounted for yet."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def closed(self) -> bool:
        """Whether every sample is accounted for, as ok, as an error or as cancelled, and judged."""
        return self.samples == self.ok + self.errors + self.cancelled and not self.unjudged

    @classmethod
    def of(cls, samples: int, shards: Sequence[Shard]) -> Books:
        """Count the samples in the shards, of `samples` in total."""
        columns = ((shard.ok, shard.errors, shard.cancelled, shard.unjudged) for shard in shards)
        return cls(samples, *map(sum, zip((0, 0, 0, 0), *columns, strict=True)))


@dataclass(frozen=True, slots=True)
class Success:
    """The content of OUT/_SUCCESS: the counts, and every file of the output."""

    samples: int
    ok: int
    errors: int
    files: tuple[Shard, ...]
    cancelled: int = 0


def settings_digest(fingerprint: Fingerprint) -> str:
    """Return the SHA-256 of what decides a sample, whatever rows there are."""
    return hashlib.sha256(to_json(sorted(fingerprint.settings.items())).encode()).hexdigest()


def write_manifest(claim: Claim, manifest: Manifest, given: Mapping[str, Any]) -> None:
    """Write OUT/manifest.json, and OUT/job.json with the job as `given`, which runs it again. With several writers, raises
    FileExistsError if there is a manifest."""
    job, files, folder = to_document(given), claim.files, claim.folder
    sealed = _sealed(asdict(replace(manifest, job_sha256=hashlib.sha256(job).hexdigest())))
    if files.alone:
        claim.write(folder.job, job, keep=True)
        claim.write(folder.manifest, sealed, keep=True)
        return
    temporary = folder.temporary / folder.manifest.name
    with NewFile(files, temporary) as file:
        file.write(sealed)
        file.sync()
    publish(files, temporary, folder.manifest)
    # Only now is it known whose job the folder has.
    claim.write(folder.job, job)


def restore_job(claim: Claim, manifest: Manifest, given: Mapping[str, Any]) -> None:
    """Write OUT/job.json where it is missing and `given` is the job that the manifest names."""
    job = to_document(given)
    if not is_there(claim.files, claim.folder.job) and manifest.job_sha256 == hashlib.sha256(job).hexdigest():
        claim.write(claim.folder.job, job)


def job_is_whole(folder: OutputFolder, manifest: Manifest) -> bool:
    """Return whether OUT/job.json is as it was written. Raises OutputError if it cannot be read."""
    content = read_bytes(folder.files, folder.job)
    return content is not None and manifest.job_sha256 in ("", hashlib.sha256(content).hexdigest())


def read_job(folder: OutputFolder, manifest: Manifest) -> dict[str, Any]:
    """Return the job in OUT/job.json. Raises DamageError if it is missing or changed."""
    content = read_bytes(folder.files, folder.job)
    if content is None or not job_is_whole(folder, manifest):
        raise DamageError(f"{folder.job} is missing or changed. Run the same job again, which writes it.")
    job: dict[str, Any] = json.loads(content)
    return job


def write_summary(claim: Claim, summary: Mapping[str, Any]) -> None:
    """Write OUT/summary.json, unless it has this content already."""
    document = to_document(summary)
    if read_bytes(claim.files, claim.folder.summary) != document:
        claim.write(claim.folder.summary, document)


def mark_success(claim: Claim, shards: Sequence[Shard], samples: int) -> Books:
    """Write OUT/_SUCCESS, naming every shard with its counts and its digest, if all samples are accounted for; the caller
    checks `closed`. A file with this content is left alone. Digests are those of the commits. Raises OSError, and as
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
    """Return OUT/_SUCCESS, or None if the run is not complete. Raises DamageError if it is damaged."""
    document = _read(folder, folder.success)
    if document is None:
        return None
    try:
        files = tuple(Shard(**file) for file in document["files"])
        return Success(**cast("dict[str, Any]", {**document, "files": files}))
    except (KeyError, TypeError) as error:
        raise DamageError(
            f"{folder.success} was written by another version ({error}). Run the same command again, which writes it."
        ) from error


def read_manifest(folder: OutputFolder) -> Manifest | None:
    """Return OUT/manifest.json, or None if there is none. Raises DamageError if it is damaged, ForeignFileError if no run wrote
    it."""
    document = _read(folder, folder.manifest)
    if document is None:
        return None
    if not is_manifest(document):
        raise ForeignFileError(f"{folder.manifest} was not written by a run. Choose another output.path, or move it away.")
    try:
        versions, fingerprint = Versions(**document["versions"]), Fingerprint(**document["fingerprint"])
        return Manifest(**cast("dict[str, Any]", {**document, "versions": versions, "fingerprint": fingerprint}))
    except (KeyError, TypeError) as error:
        raise DamageError(
            f"{folder.manifest} is not a manifest that this version can read ({error}). "
            "Read the shards under data/ directly, use the version that wrote them, or start over with --overwrite."
        ) from error


def without_manifest(folder: OutputFolder) -> OutputError:
    """Return the error of a folder without a manifest: no run has written there, or its manifest is lost."""
    shards = folder.shards()
    if not shards:
        return OutputError(f"{folder.path}: no run has written here; give the folder that the job names as output.path")
    return OutputError(
        f"{folder.path} holds {counted(len(shards), 'file')} of samples but no manifest.json, without which it is unknown "
        "which job they belong to. Restore manifest.json from a copy."
    )


def read_summary(folder: OutputFolder) -> dict[str, Any]:
    """Return OUT/summary.json; empty if there is none. Raises DamageError if it is damaged."""
    return _read(folder, folder.summary) or {}


def _sealed(value: Mapping[str, Any]) -> bytes:
    return to_document({**value, _DIGEST: _digest(value)})


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_document(value)).hexdigest()


def _remedy(folder: OutputFolder, path: Path) -> str:
    if path != folder.manifest:
        return "Run the same command again, which writes it."
    # What nothing shows to be a run's is not overwritten.
    first = "" if has_manifest(folder) else f"move it and {folder.job.name} away and "
    return f"Restore it from a copy, or {first}start over with --overwrite."


def _read(folder: OutputFolder, path: Path) -> dict[str, Any] | None:
    content = read_bytes(folder.files, path)
    if content is None:
        return None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} is damaged: it cannot be read as JSON ({error}). {_remedy(folder, path)}") from error
    if not isinstance(document, dict):
        raise DamageError(f"{path} is damaged: it holds no JSON object. {_remedy(folder, path)}")
    found = cast("dict[str, Any]", document)
    digest = found.pop(_DIGEST, None)
    if digest is not None and digest != _digest(found):
        raise DamageError(f"{path} is damaged: it is not what the run wrote. {_remedy(folder, path)}")
    return found
