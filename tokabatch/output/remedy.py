"""The shell command that repairs an output folder: it moves away what is not the run's, and computes again what is damaged.

One line to paste into a shell. It deletes nothing itself; `tokabatch run --repair` deletes what it has read and found damaged.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokabatch.errors import DamageError, ForeignFileError, OutputError
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import Inspection
from tokabatch.output.journal import Shard
from tokabatch.output.manifest import Manifest, job_is_whole
from tokabatch.output.shards import open_shard
from tokabatch.storage.listing import Mark, is_there

_JOB = "JOB.yaml"
_SHOWN = 5


def repair_command(folder: OutputFolder, manifest: Manifest, foreign: Sequence[str] = (), *, repair: bool = True) -> str:
    """Return the command; `foreign` are names relative to the folder. Relative paths of the job count from the folder that it
    was started in. Raises OutputError if the folder cannot be read."""
    out = folder.path.absolute()
    commands: list[str] = []
    if foreign:
        aside = _unused(folder, out)
        commands += [_join("mkdir", aside), _join("mv", *(out / name for name in foreign), f"{aside}/")]
    if Path(manifest.working_folder) != Path.cwd():
        commands.append(_join("cd", manifest.working_folder))
    whole = job_is_whole(folder, manifest)
    job = folder.job.absolute() if whole else _JOB
    # A job's path is text; one with other bytes was relative to a folder with such a name.
    is_text = str(out).encode(errors="replace").decode() == str(out)
    target = out if is_text else os.path.relpath(out, manifest.working_folder)
    commands.append(_join("tokabatch", "run", job, f"output.path={target}", *(["--repair"] if repair else [])))
    note = "" if whole else f"  # {folder.job.name} is missing or changed: write the name of the job's own file for {_JOB}"
    return " && ".join(commands) + note


def begin_record(claim: Claim, manifest: Manifest, shards: Iterable[tuple[Shard, Mark]], damaged: Iterable[Shard] = ()) -> None:
    """As `Claim.begin`, for the run with this manifest. Raises OSError, and OutputError if the folder cannot be read."""
    claim.begin(manifest.run, manifest.marks, shards, repair_command(claim.folder, manifest), damaged)


def refuse_faults(folder: OutputFolder, manifest: Manifest, found: Inspection, *, repair: bool = False) -> None:
    """Raise DamageError for damaged shards that were committed (unless they are to be repaired), ForeignFileError for files of
    another run. A damaged `_SUCCESS` is no obstacle if the journal holds the same."""
    damage = [fault for fault in found.faults if fault.kind in ("damaged", "missing")]
    damage += [fault for fault in found.faults if fault.kind == "record" and (fault.file != "_SUCCESS" or not manifest.run)]
    foreign = [fault for fault in found.faults if fault.kind == "foreign"]
    if damage and not repair:
        faults = [f"{folder.path / fault.file} {fault.problem}" for fault in damage]
        raise DamageError(_damage(folder, manifest, faults, [fault.file for fault in foreign]))
    if foreign:
        names = [fault.file for fault in foreign]
        raise ForeignFileError(
            f"{folder.path / names[0]} {foreign[0].problem}. Nothing was changed. This moves it away and continues: "
            + repair_command(folder, manifest, names, repair=bool(damage))
        )


def refuse_unrecorded(folder: OutputFolder, manifest: Manifest, found: Inspection) -> None:
    """Raise DamageError for a shard of this run that no record describes."""
    if found.unrecorded:
        raise DamageError(
            _damage(folder, manifest, [f"{file.path} is in no record of commits" for file in found.unrecorded], ())
        )


def num_of_other_judges(manifest: Manifest, found: Inspection) -> int:
    """Return the number of good shards whose verdicts are not of the judge in the manifest."""
    others = 0
    for _, file in found.good:
        with open_shard(file) as parquet:
            others += not manifest.is_judge_of(parquet.schema_arrow.metadata)
    return others


def refuse_other_verdicts(folder: OutputFolder, manifest: Manifest, found: Inspection) -> None:
    """Raise OutputError if samples of the folder were not judged by the judge in the manifest, as after an interrupted
    `score`."""
    if others := num_of_other_judges(manifest, found):
        raise OutputError(
            f"{folder.path}: the verifier that the folder names has not judged {others:,} of "
            f"{counted(len(found.good), 'file')} yet. `tokabatch score {quote(str(folder.path))}` judges them."
        )


def _damage(folder: OutputFolder, manifest: Manifest, faults: Sequence[str], foreign: Sequence[str]) -> str:
    listed = "; ".join(faults[:_SHOWN]) + (f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else "")
    return (
        f"{listed}. Nothing was changed. `tokabatch check {quote(str(folder.path))}` reads every file. To compute again "
        f"what is damaged, and nothing else: {repair_command(folder, manifest, foreign)}"
    )


def quote(text: str) -> str:
    """Quote one word of a shell command, on one line whatever it contains."""
    if text.isprintable():
        return shlex.quote(text)
    # The shell strips line breaks off the end of a command's output; add an end, so that those of a folder's name are kept.
    text += "/" if text.endswith("\n") else ""
    codes = text.encode(errors="surrogateescape")
    spelled = "".join(chr(code) if 32 <= code < 127 and chr(code) not in "\\'" else f"\\0{code:03o}" for code in codes)
    return f"\"$(printf '%b' '{spelled}')\""


def _join(*words: str | Path) -> str:
    return " ".join(quote(str(word)) for word in words)


def _unused(folder: OutputFolder, out: Path) -> Path:
    """Return an unused name beside the output folder."""
    number = 1
    while is_there(folder.files, aside := out.with_name(f"{out.name}.foreign{'' if number == 1 else f'-{number}'}")):
        number += 1
    return aside
