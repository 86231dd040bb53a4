"""What the verdicts of a run say, where all its samples are there; of a part of them, which are the short ones, nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.manifest import Manifest, read_manifest
from tokabatch.output.stored_verdicts import read_verdicts
from tokabatch.scoring.early_stopping import StopRule
from tokabatch.scoring.estimates import CHOICES, Estimate, Judged, estimate_all, estimate_choices, estimator
from tokabatch.storage.listing import consistently


def read_estimates(folder: OutputFolder) -> tuple[Estimate, ...] | None:
    """The figures of an output folder; none while samples or verdicts are missing, None where no sample is judged.
    Raises OutputError where the folder cannot be read, DamageError where it is damaged."""

    def read() -> tuple[Estimate, ...] | None:
        manifest = read_manifest(folder)
        scored = _scores_texts(manifest)
        found = read_verdicts(recorded_shards(folder, manifest), manifest, characters=scored)
        if found is None:
            return None
        arrays = dict(cast("Mapping[str, Any]", found))
        if arrays.pop("unjudged").any() or (manifest is not None and manifest.samples > len(arrays["row"])):
            return ()
        if scored:
            return estimate_choices(characters=arrays.pop("characters"), judged=Judged(**arrays))
        return estimate_all(Judged(**arrays), _rule(manifest))

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
