"""What the verdicts of a run say, where all its samples are there; of a part of them, which are the short ones, nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tokabatch.output.excerpts import Excerpt, read_samples
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.manifest import Manifest, read_manifest
from tokabatch.output.stored_verdicts import read_verdicts
from tokabatch.scoring.early_stopping import StopRule
from tokabatch.scoring.estimates import CHOICES, Estimate, Judged, estimate_all, estimate_choices, estimator
from tokabatch.scoring.row_counts import RowCounts, count_rows, most_frequent_answers
from tokabatch.storage.listing import consistently


@dataclass(frozen=True, slots=True)
class Findings:
    """The figures of an output folder, as `read_estimates` returns them, and what is known of each row, if samples are drawn
    and all are there: how many are right, and the `hardest` rows, each with a sample that gives its most frequent answer and
    the number of those that do."""

    estimates: tuple[Estimate, ...] | None
    row_counts: RowCounts | None = None
    hardest: tuple[tuple[int, Excerpt, int], ...] = ()
    """The place of the row in `row_counts`, the sample, and how many give its answer."""


def read_estimates(folder: OutputFolder) -> tuple[Estimate, ...] | None:
    """The figures of an output folder; none while samples or verdicts are missing, None where no sample is judged.
    Raises OutputError where the folder cannot be read, DamageError where it is damaged."""
    return read_findings(folder, 0).estimates


def read_findings(folder: OutputFolder, hardest: int) -> Findings:
    """What the verdicts say of all rows, and of up to so many of the hardest. Raises as `read_estimates` does."""

    def read() -> Findings:
        manifest = read_manifest(folder)
        scored, shards = _scores_texts(manifest), recorded_shards(folder, manifest)
        found = read_verdicts(shards, manifest, characters=scored)
        if found is None:
            return Findings(None)
        arrays = dict(cast("Mapping[str, Any]", found))
        ok, verdict = arrays.pop("ok"), arrays.pop("verdict")
        if arrays.pop("unjudged").any() or (manifest is not None and manifest.samples > len(arrays["row"])):
            return Findings(())
        if not scored and not verdict.any():
            # No figure follows from none.
            return Findings(())
        if scored:
            return Findings(estimate_choices(characters=arrays.pop("characters"), judged=Judged(**arrays)))
        judged = Judged(**arrays)
        estimates = estimate_all(judged, _rule(manifest))
        if not hardest:
            return Findings(estimates)
        counts = count_rows(judged, ok, verdict)
        places = counts.hardest(hardest)
        answers = most_frequent_answers(judged, ok, counts.row[places])
        samples = read_samples(shards, [sample for sample, _ in answers], manifest and manifest.id_column)
        answered = (number for _, number in answers)
        return Findings(estimates, counts, tuple(zip(places.tolist(), samples, answered, strict=True)))

    return consistently(read, folder.path)


def read_estimator(folder: OutputFolder) -> str:
    """What estimates them."""
    manifest = read_manifest(folder)
    return CHOICES if _scores_texts(manifest) else estimator(_rule(manifest))


def _scores_texts(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.job.get("mode") == "score"


def _rule(manifest: Manifest | None) -> StopRule | None:
    stop = None if manifest is None else (manifest.job.get("verify") or {}).get("stop")
    return None if stop is None else StopRule(**stop)
