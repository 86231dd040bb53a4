"""The job by whose verifier the samples of an output folder are judged again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokabatch.errors import JobError
from tokabatch.job import Job, VerifyConfig
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import Manifest, read_job, read_manifest, without_manifest


def manifest_to_judge(folder: OutputFolder) -> Manifest:
    """Return the folder's manifest. Raises OutputError if it has none."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise without_manifest(folder)
    return manifest


def job_to_judge(folder: OutputFolder, manifest: Manifest, overrides: Sequence[str], say: Callable[[str], object]) -> Job:
    """Return the folder's job with the overrides applied. Another verifier gets no options of the earlier one, which `say`
    tells, but its column of the reference and all else. Raises UsageError if the job has no verifier then, or cannot be judged
    here."""
    other = next((each for each in overrides if not each.startswith(("verify.", "verify="))), None)
    if other is not None:
        meant = f"; write verify.{other}" if other.partition("=")[0] in VerifyConfig.model_fields else ""
        raise JobError(f"override `{other}`: only keys under verify can be given here, samples are not computed again{meant}")
    given = read_job(folder, manifest)
    verify = given.get("verify")
    own = verify["kind"] if verify else None
    job = Job.load(given, *overrides)
    if own is not None and verify and verify.get("options") and job.verify is not None and Path(job.verify.kind) != Path(own):
        job = Job.load({**given, "verify": {**verify, "options": {}}}, *overrides)
        if job.verify is not None and not any(each.startswith(("verify=", "verify.options")) for each in overrides):
            dropped = f"verify.options {json.dumps(verify['options'], ensure_ascii=False)} of {own}"
            say(f"{dropped} are not passed to {job.verify.kind}; write options of its own as verify.options.NAME=VALUE")
    relative = own is not None and ".py" in own and not Path(own).is_absolute()
    if relative and job.verify is not None and job.verify.kind == own and Path(manifest.working_folder) != Path.cwd():
        raise JobError(f"verify.kind: {own} is relative to {manifest.working_folder}; run this command there")
    stop = (manifest.job.get("verify") or {}).get("stop")
    if job.verify is not None and job.to_dict()["verify"]["stop"] != stop:
        raise JobError("verify.stop: rows stop while they are sampled, and nothing is sampled here; remove it from the command")
    if job.verify is None:
        raise JobError("the job of this folder has no verifier; name one: verify.kind=KIND verify.answer=COLUMN")
    return job
