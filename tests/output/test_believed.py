"""What commands make of a folder that cannot be read, is not the run's alone, or changes while it is read. Runs through
`tokabatch.run` with a scripted engine."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_engine

from benchmarks.scripted_engine import QUICKSTART
from tokabatch import Job, RunSummary, plan, run
from tokabatch.errors import DamageError, OutputError
from tokabatch.output import export as export_module
from tokabatch.output import folder as folder_module
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import drop_errors
from tokabatch.output.export import export
from tokabatch.output.integrity import check
from tokabatch.output.lock import is_claimed
from tokabatch.output.scratch import PREFIX, scratch_folder
from tokabatch.output.status import read_status
from tokabatch.report.progress import NullProgress
from tokabatch.report.review import write_report
from tokabatch.runner import run as runner
from tokabatch.storage.atomic_files import DurableFiles

ROOT = Path(__file__).parent.parent.parent
Go = Callable[..., RunSummary]


@pytest.fixture
def go(tmp_path: Path) -> Iterator[Go]:
    """Runs the job into `tmp_path / out`: 6 rows, one without a prompt, 2 samples each, 4 rows a shard."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {i}?" if i != 3 else None}) + "\n" for i in range(6)))

    def start(
        out: str | Path = "out", *, flags: dict[str, bool] | None = None, told: list[str] | None = None, **sections: Any
    ) -> RunSummary:
        display = NullProgress()
        display.message = ([] if told is None else told).append
        return run(job_of(tmp_path, tmp_path / out, **sections), display, **(flags or {}))

    with scripted_engine():
        yield start


def job_of(folder: Path, out: Path, **sections: Any) -> Job:
    job: dict[str, Any] = {
        "model": {"path": str(QUICKSTART), "dtype": "float32"},
        "input": {"path": str(folder / "rows.jsonl")},
        "prompt": {"template": "{{ question }}"},
        "generation": {"n": 2, "max_tokens": 8},
        "engine": {"device": "cpu", "max_running": 4},
        "output": {"path": str(out), "rows_per_shard": 4},
        "errors": {"max_fraction": 1.0},
    }
    return Job.load({**job, **{name: {**job.get(name, {}), **values} for name, values in sections.items()}})


class Failing(DurableFiles):
    """Fails to open a file, or to list a folder, of one name; `times` times, or always."""

    def __init__(self, name: str, code: int, times: int = 1 << 30, skip: int = 0) -> None:
        super().__init__()
        self.name, self.code, self.times, self.skip = name, code, times, skip

    def open_old(self, path: Path) -> Any:
        self._fail(path)
        return super().open_old(path)

    def names(self, folder: Path) -> list[str]:
        self._fail(folder)
        return super().names(folder)

    def _fail(self, path: Path) -> None:
        if path.name == self.name:
            self.skip -= 1
            if self.skip < 0 and self.times > 0:
                self.times -= 1
                raise OSError(self.code, os.strerror(self.code), str(path))


CODES = [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.EIO]
PLACES = ["part-00000.parquet", "data", "manifest.json", "commits.jsonl"]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_read_is_called_that(
    place: str, code: int, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    go()
    before = everything(out)
    commands = [
        lambda: check(out),
        lambda: read_status(out),
        lambda: export(out, tmp_path / "all.jsonl"),
        lambda: write_report(out, tmp_path / "report.html"),
        lambda: plan(job_of(tmp_path, out)),
        lambda: go(),
    ]
    for command in commands:
        monkeypatch.setattr(folder_module, "DurableFiles", lambda: Failing(place, code))
        with pytest.raises(OutputError) as caught:
            command()
        assert caught.value.exit_code == 2 and f"cannot be read: {os.strerror(code)}" in str(caught.value)
        assert place in str(caught.value) and "rm " not in str(caught.value) and "emove" not in str(caught.value)
    monkeypatch.undo()
    assert everything(out) == before and check(out).exit_code == 0


def everything(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"retry_errors": True}], ids=str)
def test_a_listing_that_fails_once_is_not_an_empty_folder(
    flags: dict[str, bool], go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the listings of a start in turn, until none is left; the next start makes all well."""
    reference, shards, before = None, 0, tmp_path / "before"
    go(before, generation={"n": 2, "max_tokens": 4 if flags.get("overwrite") else 8})
    for skip in range(20):
        out = tmp_path / f"out{skip}"
        shutil.copytree(before, out)
        files = Failing("data", errno.EACCES, times=1, skip=skip)
        monkeypatch.setattr(folder_module, "DurableFiles", lambda files=files: files)
        told: list[str] = []
        try:
            go(out, flags=flags, told=told)
        except OutputError as error:
            assert "cannot be read: Permission denied" in str(error)
        else:
            if files.times == 1:
                assert skip >= 3
                return
            said = any("are not joined" in text and "cannot be read" in text for text in told)
            # The last listing is for what killed starts have left; without it nothing is missing.
            assert said or (samples(out) == reference and len(list((out / "data").iterdir())) == shards), "nothing was said"
        finally:
            monkeypatch.setattr(folder_module, "DurableFiles", DurableFiles)
        assert go(out, flags=flags).exit_code == 0 and check(out).exit_code == 0
        reference, shards = reference or samples(out), len(list((out / "data").iterdir()))
        assert samples(out) == reference
    raise AssertionError("there is no end of listings")


def samples(out: Path) -> list[dict[str, Any]]:
    rows = [row for path in (out / "data").iterdir() for row in pq.read_table(path).to_pylist()]
    kept = [{name: value for name, value in row.items() if name != "num_cached_tokens"} for row in rows]
    return sorted(kept, key=lambda row: (row["row_index"], row["sample_index"]))


def test_a_foreign_file_is_named_by_every_command(go: Go, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go()
    for table in (pa.table({"a": [1]}), pa.table({"status": [1], "row_index": ["x"]})):
        pq.write_table(table, out / "data" / "part-00050.parquet")
        for command in (
            lambda: read_status(out),
            lambda: export(out, tmp_path / "all.jsonl"),
            lambda: write_report(out, tmp_path / "report.html"),
            lambda: plan(job_of(tmp_path, out)),
            lambda: go(),
        ):
            with pytest.raises(OutputError, match=r"part-00050\.parquet") as caught:
                command()
            assert caught.value.exit_code == 2
        found = check(out)
        assert (found.exit_code, [fault.file for fault in found.faults]) == (4, ["data/part-00050.parquet"])
        assert found.remedy is not None
        if table.num_columns == 1:
            mend(found.remedy, tmp_path)
        else:
            # The same command but for the name of the folder that it moves the file to.
            subprocess.run(found.remedy.partition(" && tokabatch")[0], shell=True, cwd=tmp_path, check=True)
        assert check(out).exit_code == 0
        moved = next(path for path in tmp_path.rglob("part-00050.parquet"))
        assert pq.read_table(moved).equals(table), "a foreign file is moved away, not deleted"


def mend(remedy: str | None, folder: Path) -> None:
    """Paste the command."""
    assert remedy is not None and "\n" not in remedy
    command = remedy.replace("tokabatch run", f"{shlex.quote(sys.executable)} -m tokabatch run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (command, done.stderr)


def test_the_remedy_for_a_folder_named_like_a_shard_works_in_a_path_with_a_line_break(go: Go, tmp_path: Path) -> None:
    out = tmp_path / "a b\n'c$\\"
    go(out)
    (out / "data" / "part-00099.parquet").mkdir()
    (out / "data" / "part-00099.parquet" / "mine").write_text("mine")
    found = check(out)
    assert [fault.file for fault in found.faults] == ["data/part-00099.parquet"]
    mend(found.remedy, tmp_path)
    assert check(out).exit_code == 0 and [path.read_text() for path in tmp_path.rglob("mine")] == ["mine"]


def test_the_remedy_says_when_the_job_is_missing(go: Go, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go()
    (out / "data" / "part-00000.parquet").write_bytes(b"")
    assert str(out / "job.json") in str(check(out).remedy)
    for change in (lambda path: path.write_text("{}"), lambda path: path.unlink()):
        change(out / "job.json")
        remedy = str(check(out).remedy)
        assert "run JOB.yaml" in remedy and "# job.json is missing or changed" in remedy and str(out / "job.json") not in remedy
    assert go(flags={"repair": True}).exit_code == 0 and check(out).exit_code == 0 and (out / "job.json").exists()


def test_verify_beside_a_writer_says_so(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    go()
    with Claim(out) as claim:
        found = check(out)
        assert (found.exit_code, found.running) == (0, True)
        assert is_claimed(claim.folder)
        whole = (out / "data" / "part-00000.parquet").read_bytes()
        (out / "data" / "part-00000.parquet").write_bytes(b"")
        found = check(out)
        assert found.exit_code == 4 and "a run is writing" in str(found.facts["result"])
        (out / "data" / "part-00000.parquet").write_bytes(whole)


def test_verify_while_overwrite_deletes_finds_no_damage(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file that goes."""
    out = tmp_path / "out"
    go()
    seen: list[int] = []

    class Watched(DurableFiles):
        def remove(self, path: Path) -> None:
            super().remove(path)
            if path.suffix == ".parquet" or path.name in ("_SUCCESS", "summary.json", "commits.jsonl"):
                monkeypatch.setattr(folder_module, "DurableFiles", DurableFiles)
                seen.append(check(out).exit_code)

    monkeypatch.setattr(folder_module, "DurableFiles", Watched)
    go(flags={"overwrite": True})
    assert len(seen) >= 5 and set(seen) == {75}, seen


def test_export_begins_anew_where_a_shard_is_replaced_between_its_passes(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    go()
    real = export_module._deal

    def once(*arguments: Any) -> None:
        monkeypatch.setattr(export_module, "_deal", real)
        with Claim(out) as claim:
            assert drop_errors(claim) == 2
        real(*arguments)

    monkeypatch.setattr(export_module, "_deal", once)
    with pytest.raises(DamageError):
        export(out, tmp_path / "all.jsonl")  # Nobody recorded that: it is no run's doing.
    assert not (tmp_path / "all.jsonl").exists()
    go(flags={"repair": True})

    def while_a_run_goes_on(*arguments: Any) -> None:
        monkeypatch.setattr(export_module, "_deal", real)
        go(flags={"retry_errors": True})
        real(*arguments)

    monkeypatch.setattr(export_module, "_deal", while_a_run_goes_on)
    exported = export(out, tmp_path / "all.jsonl")
    assert exported.samples == 12 == len((tmp_path / "all.jsonl").read_text().splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "out", "rows.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_stopped_leaves_nothing_for_long(number: int, go: Go, tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "x" / "all.jsonl"
    target.parent.mkdir()
    go()
    # Many short sleeps: Python's handler for a signal that comes just before a sleep is called only after it.
    program = "\n".join(
        (
            "import signal, sys, time",
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)",
            "from tokabatch.cli import main",
            "from tokabatch.output import export",
            "export._deal = lambda *_: (print('.', flush=True), [time.sleep(0.1) for _ in range(600)])",
            f"sys.argv[1:] = {['export', str(out), '--to', str(target)]!r}",
            "main()",
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == ".\n"
        assert len(scratches(target.parent)) == 1
        process.send_signal(number)
        code = process.wait(30)
    assert code == {signal.SIGINT: 130, signal.SIGKILL: -9}.get(number, 75)
    assert len(scratches(target.parent)) == (number == signal.SIGKILL)
    export(out, target)
    assert [path.name for path in target.parent.iterdir()] == ["all.jsonl"]


def scratches(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(PREFIX)]


def test_scratch_of_the_living_and_of_others_stays(tmp_path: Path) -> None:
    other = tmp_path / f"{PREFIX}of-an-earlier-version"
    other.mkdir()
    (other / "bucket-0").write_bytes(b"rows")
    with scratch_folder(tmp_path) as living, scratch_folder(tmp_path) as second:
        assert living.exists() and second.exists() and other.exists()
    assert list(tmp_path.iterdir()) == [other]


@pytest.fixture
def earlier_version(go: Go, tmp_path: Path) -> Iterator[Path]:
    """A complete run as a version left it that kept no record of commits and named no run."""
    out = tmp_path / "out"
    go()
    (out / "commits.jsonl").unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    for name in ("run", "fingerprint_sha256", "job_sha256", "sha256"):
        del manifest[name]
    (out / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2}))
    success = json.loads((out / "_SUCCESS").read_text())
    del success["sha256"]
    for file in success["files"]:
        table = pq.read_table(out / file["name"])
        kept = {key: value for key, value in table.schema.metadata.items() if key not in (b"tokabatch.run",)}
        pq.write_table(table.replace_schema_metadata(kept), out / file["name"], write_page_checksum=True)
        file["sha256"], file["bytes"] = sha256(out / file["name"]), (out / file["name"]).stat().st_size
    (out / "_SUCCESS").write_text(json.dumps(success))
    yield out


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


class TestRunsOfAnEarlierVersion:
    def test_a_complete_one_stays_as_it_is_and_is_extended(self, earlier_version: Path, go: Go) -> None:
        before = everything(earlier_version)
        assert check(earlier_version).exit_code == 0
        assert go().exit_code == 0 and everything(earlier_version) == before
        summary = go(generation={"n": 3, "max_tokens": 8})
        assert (summary.earlier, summary.exit_code) == (12, 0)
        assert check(earlier_version).exit_code == 0 and (earlier_version / "commits.jsonl").exists()
        shards = {name: content for name, content in before.items() if name.startswith("data/")}
        assert shards.items() <= everything(earlier_version).items()

    def test_its_digests_are_those_of_success(self, earlier_version: Path, go: Go) -> None:
        victim = earlier_version / "data" / "part-00001.parquet"
        table = pq.read_table(victim)
        texts = pa.array(["not what the model wrote"] * table.num_rows)
        pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", texts), victim, write_page_checksum=True)
        with pytest.raises(DamageError, match=r"part-00001\.parquet is damaged"):
            go()
        with pytest.raises(DamageError, match=r"part-00001\.parquet is damaged"):
            go(generation={"n": 3, "max_tokens": 8})
        assert go(flags={"repair": True}).exit_code == 0 and check(earlier_version).exit_code == 0

    def test_without_success_its_pages_are_held_against_their_checksums(self, earlier_version: Path, go: Go) -> None:
        (earlier_version / "_SUCCESS").unlink()
        victim = earlier_version / "data" / "part-00001.parquet"
        whole = bytearray(victim.read_bytes())
        with pq.ParquetFile(victim) as file:
            column = file.metadata.row_group(0).column(file.schema_arrow.names.index("text"))
            begin = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        changed = bytearray(whole)
        changed[begin + column.total_compressed_size - 2] ^= 1
        victim.write_bytes(changed)
        with pytest.raises(DamageError, match=r"part-00001\.parquet is damaged"):
            go()
        victim.write_bytes(whole)
        assert go().exit_code == 0 and check(earlier_version).exit_code == 0
        victim.write_bytes(changed)
        with pytest.raises(DamageError, match=r"part-00001\.parquet is damaged"):
            go()


def test_a_run_is_identified_in_every_shard_and_continues_under_its_name(go: Go, tmp_path: Path) -> None:
    go()
    go(generation={"n": 3, "max_tokens": 8})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    told = {
        tuple(pq.read_schema(path).metadata[key].decode() for key in (b"tokabatch.run", b"tokabatch.fingerprint"))
        for path in (tmp_path / "out" / "data").iterdir()
    }
    assert told == {(manifest["run"], manifest["fingerprint_sha256"])} and len(manifest["run"]) == 32


def test_a_shard_of_another_job_with_the_missing_samples_is_refused(go: Go, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(generation={"n": 1, "max_tokens": 8})
    go("other", generation={"n": 2, "max_tokens": 4})
    for path in (tmp_path / "other" / "data").iterdir():
        if 1 in pq.read_table(path)["sample_index"].to_pylist():
            shutil.copyfile(path, out / "data" / f"part-{len(list((out / 'data').iterdir())):05}.parquet")
    with pytest.raises(OutputError, match="belongs to another run"):
        go()
    assert check(out).exit_code == 4


def test_finished_samples_are_committed_when_damage_is_found(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops at the commit that finds it; what it holds by then is on the disk, and the next start has less to do."""
    out = tmp_path / "out"
    real = runner.Recorder.add

    def add(self: Any, completions: Any, *given: Any) -> None:
        real(self, completions, *given)
        if (out / "data" / "part-00000.parquet").exists() and time.sleep(0.01) is None:
            (out / "data" / "part-00000.parquet").write_bytes(b"")

    monkeypatch.setattr(runner.Recorder, "add", add)
    for module in ("preparation", "recorder"):
        monkeypatch.setattr(f"tokabatch.runner.{module}.BATCH_SAMPLES", 4)
    with pytest.raises(DamageError, match=r"part-00000\.parquet is not what was committed any more.*--repair"):
        go()
    monkeypatch.setattr(runner.Recorder, "add", real)
    assert go(flags={"repair": True}).exit_code == 0 and check(out).exit_code == 0
