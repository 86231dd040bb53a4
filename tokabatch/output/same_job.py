"""Compare the run in an output folder with a job that wants to continue it.

A job that would draw other samples than those in the folder is refused, with the differences. A row with error samples only may
have been replaced: it was never sampled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NoReturn

import numpy as np

from tokabatch.arrays import Bool
from tokabatch.errors import DamageError, OutputError
from tokabatch.input.fingerprint import (
    Fingerprint,
    changed_settings,
    changed_sizes,
    is_of_verify,
    verify_overrides,
    verify_section,
)
from tokabatch.input.rows import NO_PLACES, RowPlaces
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.number_text import counted, first_counted
from tokabatch.output.existing_results import read_committed, sampled_rows
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.manifest import Manifest, Versions, read_manifest, versions_here
from tokabatch.output.remedy import quote
from tokabatch.storage.listing import consistently


@dataclass
class EarlierRun:
    """`versions` are those of this process. With `retry_errors`, rows without a good sample may differ, whether or not they
    have error samples; without it, rows that have only error samples. With `replaceable`, a run that has only error rows may be
    of another job: it is `worthless` then, and to be deleted."""

    folder: OutputFolder
    manifest: Manifest
    versions: Versions
    retry_errors: bool
    replaceable: bool = False
    repaired: int = 0
    """Error rows that have been replaced, set once `compare` has seen the rows."""
    worthless: str = ""
    """What differs from the job, where that is no obstacle; set by `compare`."""

    def compare(self, now: Fingerprint, digests: RowDigests | None = None, places: RowPlaces = NO_PLACES) -> None:
        """Raise OutputError showing what differs between that run and the job; `digests` are given once the rows are read, with
        their `places`."""
        differences = changed_settings(self.manifest.fingerprint, now)
        if differences and self._has_only_errors():
            self.worthless = "; ".join(differences)
            return
        if differences:
            self._refuse(differences, now)
        if digests is not None:
            self._compare_rows(now, digests, places)

    def _has_only_errors(self) -> bool:
        """Return whether nothing is lost with this run: it may be deleted, and its shards, none of which is missing, have error
        rows and no good sample."""
        if not self.replaceable:
            return False
        with suppress(OutputError):
            record = self.folder.record()
            states = () if record is None else record.versions.values()
            if any(shard is not None and shard.ok for known in states for shard in known[-1:]):
                # Without reading a shard.
                return False
            shards = consistently(lambda: recorded_shards(self.folder, self.manifest), self.folder.path)
            good, bad = consistently(lambda: sampled_rows(self.folder, self.manifest.rows), self.folder.path)
            return bool(shards) and bool(bad.any()) and not good.any()
        return False

    def describe_worthless(self) -> tuple[str, ...]:
        """Return a note that this run is deleted, and why."""
        return (f"{self.folder.path} holds only error rows, of a job that differs ({self.worthless}): the run starts over",)

    def compare_n(self, n: int) -> None:
        """Raise OutputError if the folder holds samples beyond the first `n` of a row, for a job of which no row has a number
        of its own."""
        then = self.manifest
        every = then.job.get("generation", {}).get("n", 0)
        if n >= every or then.samples != every * then.rows:
            return
        # Damage is refused with its own remedy.
        with suppress(DamageError):
            counts = np.full(then.rows, n, np.int64)
            consistently(lambda: read_committed(self.folder, counts, errors=not self.retry_errors), self.folder.path)

    def compare_limit(self, limit: int) -> None:
        """Raise OutputError if the folder holds samples of rows behind the first `limit`."""
        if limit >= self.manifest.rows:
            return
        # Damage is refused with its own remedy.
        with suppress(DamageError):
            good, bad = consistently(lambda: sampled_rows(self.folder, self.manifest.rows), self.folder.path)
            self._refuse_fewer(limit, good if self.retry_errors else good | ~bad)

    def _refuse_fewer(self, rows: int, held: Bool, sizes: Sequence[str] = ()) -> None:
        """Raise OutputError if rows behind the first `rows` have samples that count; `held` is of shape [rows then]."""
        if held[rows:].any():
            self._refuse([f"input: {counted(self.manifest.rows, 'row')} then, {rows:,} now", *sizes])

    def _compare_rows(self, now: Fingerprint, digests: RowDigests, places: RowPlaces) -> None:
        then, common = self.manifest.fingerprint, digests.head(self.manifest.fingerprint.rows)
        sums = (common.content_sha256, common.prompt_sha256)
        if len(common) == then.rows and sums == (then.rows_sha256, then.prompts_sha256):
            return
        sizes = changed_sizes(then, now)
        known = RowDigests.read(self.folder.row_digests) or digests.head(0)
        good, bad = sampled_rows(self.folder, then.rows)
        held = good if self.retry_errors else good | ~bad
        self._refuse_fewer(len(common), held, sizes)
        if held[len(known) : len(common)].any():
            self._refuse(
                [f"input or prompts ({self.folder.row_digests}, which identifies the rows, is missing or damaged)", *sizes]
            )
        common = common.head(len(known))
        known = known.head(len(common))
        other_rows = known.content != common.content
        if (found := other_rows & held[: len(common)]).any():
            change = f"input: not the same any more in its {first_counted(then.rows, 'row')}, the first that differs is"
            advice = "rows may be added at the end, and error rows may be repaired"
            self._refuse([f"{change} {places.name(_first(found))}; {advice}", *sizes])
        if (found := (known.prompt != common.prompt) & ~other_rows & (good | ~bad)[: len(common)]).any():
            rows_found = f"{int(found.sum()):,} of {counted(then.rows, 'row')}"
            change = f"prompts: the tokens of {rows_found} that are the same are not, the first is"
            before, here = asdict(self.manifest.versions), asdict(self.versions)
            changed = [f"{name} {before[name]} then, {here[name]} now" for name in here if before[name] != here[name]]
            self._refuse([f"{change} {places.name(_first(found))}", *changed])
        self.repaired = int(other_rows.sum())

    def _refuse(self, differences: list[str], now: Fingerprint | None = None) -> NoReturn:
        what = "holds the run of another job; what decides its output differs"
        advice = "Choose another output.path, change it back, or start over with --overwrite."
        overrides = verify_overrides(self.manifest.fingerprint, now) if now is not None else []
        if any(difference.startswith("verify.stop") for difference in differences):
            advice = (
                "Where rows stop follows from verify.stop while they are sampled. Change what differs back, choose another "
                "output.path, or start over with --overwrite."
            )
        elif overrides and all(is_of_verify(difference) for difference in differences):
            command = " ".join(("tokabatch score", *map(quote, (str(self.folder.path), *overrides))))
            advice = f"The samples are the same: `{command}` judges them by this job's verifier; then the run can be continued."
            is_judged = "verify.kind" in self.manifest.fingerprint.settings
            what = "holds a run that another verifier judged" if is_judged else "holds a run that was not judged"
        elif now is not None and all(is_of_verify(difference) for difference in differences):
            section = verify_section(self.manifest.fingerprint.settings)
            advice = f"To continue the run with its verdicts, write `{section}` into the job; or choose another output.path."
            what = "holds a run whose samples were judged, and this job has no section `verify`"
        elif any(difference.startswith("model.dtype: ") for difference in differences):
            then = json.loads(self.manifest.fingerprint.settings["model.dtype"])
            advice += f" With model.dtype={then} that run is continued (auto follows the device)."
        listed = "".join(f"\n  {difference}" for difference in differences)
        raise OutputError(f"output.path {str(self.folder.path)!r} {what}:{listed}\n{advice}")


def find_run(folder: OutputFolder, *, retry_errors: bool = False, replaceable: bool = False) -> EarlierRun | None:
    """Return the run in the folder, None if there is none. Raises OutputError if there are samples of which no manifest says
    whose they are."""
    manifest = read_manifest(folder)
    if manifest is None and (shards := folder.shards()):
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {len(shards)} file(s) of samples (data/{shards[0].path.name}) but no "
            "manifest.json, so it is unknown which job they belong to. Choose another output.path, or start over with "
            "--overwrite."
        )
    return EarlierRun(folder, manifest, versions_here(), retry_errors, replaceable) if manifest else None


def _first(marked: Bool) -> int:
    return int(np.argmax(marked))
