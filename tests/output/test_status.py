"""The status of an output folder at every point of a run's life."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest
from support.shards import write_rows

from tokabatch.cli import folder as commands
from tokabatch.errors import OutputError
from tokabatch.input.fingerprint import Fingerprint
from tokabatch.output.claim import Claim
from tokabatch.output.integrity import check
from tokabatch.output.lock import is_claimed
from tokabatch.output.manifest import Manifest, Versions, mark_success, write_manifest
from tokabatch.output.schema import CORRECT
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.status import Pace, read_pace, read_status
from tokabatch.report.folder_state import next_section, status_sections
from tokabatch.runner.score import score

SCHEMA = pa.schema([("row_index", pa.int64()), ("status", pa.string()), CORRECT])
MANIFEST = Manifest(
    "2026-01-02T03:04:05+00:00", "/home", "models/x", Versions("1", "2", "3", "4"), 3, 6, {}, Fingerprint({}, {})
)


def samples(*rows: tuple[int, str, bool | None], schema: pa.Schema = SCHEMA) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)], schema=schema
    )


def test_the_life_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert read_status(out).state == "absent"
    with Claim(out) as claim:
        write_manifest(claim, MANIFEST, {})
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=4, flush_seconds=1e9)
        status = read_status(out)
        assert (status.state, status.rows, status.samples, status.pending) == ("running", 3, 6, 6)
        assert status.correct is None
        write_rows(writer, samples((2, "ok", True), (0, "ok", False), (0, "ok", True), (2, "error", None)))
        status = read_status(out)
        assert (status.ok, status.errors, status.pending, status.shards) == (3, 1, 2, 1)
        assert status.correct == 2
        assert status.bytes == sum(path.stat().st_size for path in (out / "data").iterdir())
    assert read_status(out).state == "incomplete"


def test_the_pace_of_a_running_job_is_that_of_its_commits(tmp_path: Path) -> None:
    schema = pa.schema([*SCHEMA, ("num_output_tokens", pa.int32())])
    out = tmp_path / "out"
    with Claim(out) as claim:
        write_manifest(claim, replace(MANIFEST, samples=100), {})
        begun = (out / "manifest.json").stat().st_mtime
        assert read_pace(out, begun + 10) == Pace(pytest.approx(10))
        writer = ShardWriter(claim, schema, rows_per_shard=10, flush_seconds=1e9)
        for number, at in enumerate((-100, 30, 60, 90)):
            rows = [(row, "ok", True, 7) for row in range(10)]
            write_rows(writer, samples(*rows, schema=schema))
            os.utime(out / "data" / f"part-{number:05}.parquet", (begun + at, begun + at))
            if number == 1:
                assert read_pace(out, begun + 40) == Pace(*map(pytest.approx, (40, 10)))
        # 20 samples in the 60 s between the first and last commit of this start; 60 are missing, 3 s have passed since.
        assert read_pace(out, begun + 93) == Pace(*map(pytest.approx, (93, 3, 1 / 3, 7 / 3, 177)))
    assert read_pace(out, begun + 93) is None
    with Claim(out) as claim:
        # Whatever changes files now, it is not that samples are computed.
        write_manifest(claim, replace(MANIFEST, samples=40), {})
        assert read_pace(out, begun + 93) is None


def test_a_complete_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Claim(out) as claim:
        write_manifest(claim, MANIFEST, {})
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=4, flush_seconds=1e9)
        write_rows(writer, samples((2, "ok", True), (0, "ok", False), (0, "ok", True), (2, "error", None)))
        write_rows(writer, samples((5, "ok", False), (2, "ok", True)))
        mark_success(claim, writer.close(), 6)
        assert read_status(out).state == "complete"
    status = read_status(out)
    assert (status.state, status.committed, status.pending, status.shards) == ("complete", 6, 0, 2)


def test_cancelled_samples_are_not_pending(tmp_path: Path) -> None:
    with Claim(tmp_path / "out") as claim:
        write_manifest(claim, MANIFEST, {})
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=4, flush_seconds=1e9)
        write_rows(writer, samples((0, "ok", True), *[(0, "cancelled", None)] * 3, (1, "error", None)))
        writer.close()
        status = read_status(tmp_path / "out")
        assert (status.ok, status.errors, status.cancelled, status.pending) == (1, 1, 3, 1)
        write_rows(writer, samples((1, "cancelled", None)))
        assert mark_success(claim, writer.close(), 6).closed
    assert read_status(tmp_path / "out").state == "complete"


def test_a_run_that_is_not_verified(tmp_path: Path) -> None:
    schema = pa.schema(list(SCHEMA)[:2])
    with Claim(tmp_path / "out") as claim:
        writer = ShardWriter(claim, schema, rows_per_shard=1, flush_seconds=1e9)
        write_rows(writer, samples((0, "ok", None), schema=schema))
    status = read_status(tmp_path / "out")
    assert (status.state, status.rows, status.samples, status.pending) == ("incomplete", None, None, None)
    assert (status.ok, status.correct) == (1, None)
    # Its manifest may have been lost after its end.
    (tmp_path / "out" / "_SUCCESS").write_text('{"samples": 1, "ok": 1, "errors": 0, "files": []}')
    status = read_status(tmp_path / "out")
    assert status.state == "incomplete"
    shown = str(status_sections({"state": status.state, **asdict(status)}))
    assert "manifest.json, without which it is unknown which job these samples belong to" in shown
    assert "restored from a copy" in shown
    # A column of commands, to be pasted.
    advice = next_section(tmp_path / "out", {**asdict(status), "pending": None})
    assert all(command.startswith("tokabatch ") for section in advice for command, _ in section.rows)
    for command in (check, score):
        with pytest.raises(OutputError, match=r"holds 1 file of samples but no manifest\.json.*Restore manifest\.json from a"):
            command(tmp_path / "out")


@pytest.mark.parametrize(
    ("mode", "further"), [("generate", "; short samples finish first, so the missing ones may be longer"), ("score", "")]
)
def test_the_page_of_a_part_of_a_run_is_said_to_be_one(
    mode: str, further: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokabatch.report.review.write_report", lambda out, to: out / "report.html")
    out = tmp_path / "out"
    with Claim(out) as claim:
        claim.begin("", {}, (), "")
        write_manifest(claim, replace(MANIFEST, job={"mode": mode}), {})
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=9, flush_seconds=1e9)
        write_rows(writer, samples(*((0, "ok", True),) * 2))
        writer.close()
        commands.report(out)
        said = " ".join(capsys.readouterr().err.split())
        commands.status(out, as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert (shown["state"], shown["samples"], shown["pending"], shown["estimates"]) == ("running", 6, 4, None)
        assert shown["pace"].keys() > {"running_seconds", "seconds_left"} and shown["shared"] is None
        assert said.endswith(f"incomplete: 2 of 6 samples so far{further}")
        write_rows(writer, samples(*((1, "ok", True),) * 4))
        assert mark_success(claim, writer.close(), 6).closed
    commands.report(out)
    assert capsys.readouterr().err == ""


def test_looking_does_not_disturb(tmp_path: Path) -> None:
    out = tmp_path / "out"
    read_status(out)
    assert not out.exists()
    with Claim(out) as claim:
        read_status(out)
        assert is_claimed(claim.folder)


def test_damage_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Claim(out) as claim:
        write_manifest(claim, MANIFEST, {})
    (out / "data" / "part-00000.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(OutputError, match=r"part-00000\.parquet is damaged"):
        read_status(out)
    unknown = ('{"fingerprint": {}}', "not a manifest that this version can read")
    foreign = ('{"my": 1}', "was not written by a run. Choose another output.path, or move it away")
    for content, message in [("{", "cannot be read"), ("[]", "holds no JSON object"), unknown, foreign]:
        (out / "manifest.json").write_text(content)
        with pytest.raises(OutputError, match=message):
            read_status(out)
    # What nothing shows to be a run's is not overwritten.
    for content in ("{", "[" * 100_000):
        (out / "manifest.json").write_text(content)
        with pytest.raises(
            OutputError, match=r"read as JSON.* or move it and job\.json away and start over with --overwrite\."
        ):
            read_status(out)
    with Claim(tmp_path / "other") as claim:
        claim.begin("run", {}, (), "")
        claim.write(claim.folder.manifest, b"{", keep=True)
        with pytest.raises(OutputError, match=r"from a copy, or start over with --overwrite\."):
            read_status(tmp_path / "other")
