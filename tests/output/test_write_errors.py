"""What cannot work is refused at the start, each error with its own sentence; only what may pass ends in another start."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_engine, scripted_job, scripted_run
from support.shards import write_rows

from tokabatch import run
from tokabatch.errors import CommitError, OutputError, UsageError
from tokabatch.input.store import disk_arrays as spool
from tokabatch.output import folder as folder_module
from tokabatch.output.claim import Claim
from tokabatch.output.integrity import check
from tokabatch.output.shard_names import shard_number
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.report.progress import NullProgress
from tokabatch.report.review import write_report
from tokabatch.storage.atomic_files import DurableFiles
from tokabatch.storage.write_errors import reading_input

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ("jobs/quickstart.yaml", "input.limit=4", "generation.max_tokens=8", "--quiet")


def an_error(code: int, *names: str) -> OSError:
    return OSError(code, os.strerror(code), *names)


class Refusing(DurableFiles):
    """One system call fails always."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__()

        def refuse(*_: object) -> None:
            raise an_error(code)

        setattr(self, call, refuse)


@pytest.mark.parametrize(
    ("call", "code", "advice"),
    [
        ("link", errno.EXDEV, "Invalid cross-device link. Put _tmp and data on one file system"),
        ("link", errno.EACCES, "Permission denied. Give permission"),
        ("link", errno.EROFS, "Read-only file system. Mount it writable"),
        ("link", errno.EIO, "Input/output error. Check the disk"),
        ("link", errno.ESTALE, "Stale file handle. Check the file server"),
        ("link", errno.EINVAL, "Invalid argument. Choose another output.path"),
        ("link", errno.ENOENT, "No such file or directory. If another process removed files there"),
        ("write", errno.ENOSPC, "No space left on device. Make room there"),
        ("write", errno.EDQUOT, "Disk quota exceeded. Make room there"),
        ("write", errno.EFBIG, "File too large. Raise the limit"),
        ("fsync", errno.EIO, "Input/output error. Check the disk"),
        ("open_new", errno.EMFILE, "Too many open files. Raise the limit of open files"),
    ],
)
def test_a_start_that_cannot_commit_is_refused(tmp_path: Path, call: str, code: int, advice: str) -> None:
    with pytest.raises(OutputError, match=r"output\.path .* cannot be written") as caught:
        Claim(tmp_path / "out", Refusing(call, code))
    assert advice in str(caught.value) and caught.value.exit_code == 2
    assert ("room" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_without_hard_links_is_tried_by_renaming(tmp_path: Path) -> None:
    Claim(tmp_path / "out", Refusing("link", errno.EPERM)).release()
    with pytest.raises(OutputError):
        files = Refusing("link", errno.EPERM)
        files.rename_new = Refusing("rename_new", errno.EXDEV).rename_new
        Claim(tmp_path / "out", files)


def test_what_a_killed_start_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".probe").write_bytes(b"")
    with Claim(tmp_path):
        assert os.listdir(tmp_path / "data") == []
    others = tmp_path / "data" / ".probe-killed-0123456789ab"
    others.write_bytes(b"")
    with Claim(tmp_path, writer="a") as claim:
        pass
    assert others.exists(), "it may be of a writer that lives"
    with Claim(tmp_path, writer="b") as claim:
        # As the last one does, which joins.
        claim.clears = claim.take_alone()
    assert not others.exists()


@pytest.mark.parametrize(
    ("code", "kind", "word"),
    [
        (errno.ENOSPC, CommitError, "make room there"),
        (errno.EDQUOT, CommitError, "make room there"),
        (errno.EACCES, CommitError, "give permission"),
        (errno.EIO, CommitError, "check the disk"),
        (errno.ENOMEM, CommitError, "give the job more memory"),
        (errno.EFBIG, OutputError, "raise the limit"),
        (errno.EXDEV, OutputError, "on one file system"),
    ],
)
def test_a_commit_that_fails_says_what_to_do(tmp_path: Path, code: int, kind: type[Exception], word: str) -> None:
    with Claim(tmp_path / "out") as claim, pytest.raises(kind) as caught, claim.committing():
        raise an_error(code)
    assert word in str(caught.value) and os.strerror(code) in str(caught.value)
    assert ("room" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))


class Limited(DurableFiles):
    """No file takes more than `limit` bytes."""

    limit = 1 << 20

    def write(self, descriptor: int, content: memoryview) -> int:
        if os.fstat(descriptor).st_size + len(content) > self.limit:
            raise an_error(errno.EFBIG)
        return super().write(descriptor, content)


def test_shards_are_as_small_as_the_system_requires(tmp_path: Path) -> None:
    files = Limited()
    rows = pa.table({"status": ["ok"] * 1000, "row_index": range(1000), "text": [os.urandom(500).hex() for _ in range(1000)]})
    with Claim(tmp_path / "out", files) as claim:
        files.limit = 100_000
        writer = ShardWriter(claim, rows.schema, rows_per_shard=5000, flush_seconds=1e9)
        write_rows(writer, rows)
        assert sum(shard.rows for shard in writer.close()) == 1000
        assert len(writer.shards) > 5 and all(shard.bytes <= files.limit for shard in writer.shards)
        assert len({shard.rows for shard in writer.shards[:5]}) == 1, "the size that fits is found once"
        found = pq.read_table([tmp_path / "out" / shard.name for shard in writer.shards], columns=["row_index"])
        assert sorted(found["row_index"].to_pylist()) == list(range(1000))
        files.limit = 100
        writer.take(rows)
        with pytest.raises(OSError, match="File too large"):
            writer.commit()
    assert not (tmp_path / "out" / "_tmp").exists()


def limited_run(out: Path, limit: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokabatch", "run", *QUICKSTART, f"output.path={out}", *overrides], cwd=ROOT, text=True,
        # Python cuts compiled modules off at the limit, too, and imports them so the next time.
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip


def test_a_limit_of_file_sizes_makes_files_smaller_or_is_refused(tmp_path: Path) -> None:
    done = limited_run(tmp_path / "small", 12_000, "generation.n=1")
    assert done.returncode == 2 and "this process may write 12,000 bytes into a file. Raise the limit" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "small").exists()
    # Tokens that are drawn evenly and the logprobs of each: about 100 kB in one file.
    done = limited_run(
        tmp_path / "large",
        70_000,
        "generation.n=100",
        "generation.max_tokens=16",
        "generation.logprobs=1",
        "generation.temperature=3.0",
    )
    assert done.returncode == 0, done.stderr
    files = json.loads((tmp_path / "large" / "_SUCCESS").read_text())["files"]
    assert sum(file["ok"] for file in files) == 400 and len(files) > 1


def test_data_on_another_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm") / tmp_path.name
    assert Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev
    other.mkdir()
    try:
        (tmp_path / "data").symlink_to(other)
        with pytest.raises(OutputError, match="one file system"):
            Claim(tmp_path)
        assert os.listdir(other) == []
    finally:
        other.rmdir()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENOMEM, errno.ENOSPC])
@pytest.mark.parametrize("moment", ["append", "finish"])
def test_an_input_that_cannot_be_kept_is_refused(tmp_path: Path, monkeypatch, code: int, moment: str) -> None:
    def refuse(*_: object) -> None:
        if code == errno.ENOMEM:
            raise MemoryError
        raise an_error(code)

    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"question": "What is 1?"}\n')
    monkeypatch.setattr(spool.ArraySpool, moment, refuse)
    with pytest.raises(OutputError, match=f"tokenised input .*{os.strerror(code)}") as caught:
        scripted_run(rows, out)
    assert caught.value.exit_code == 2 and not out.exists()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (an_error(errno.EIO, "/models/a/tokenizer.json"), UsageError, "/models/a/tokenizer.json cannot be read: Input/output"),
        (an_error(errno.ESTALE), UsageError, "the model or the input cannot be read: Stale file handle. Check"),
        (an_error(errno.ENOSPC, "out/_tmp/input"), OutputError, "output.path 'out' cannot be written: No space left"),
        (MemoryError(), UsageError, "ran out of memory"),
    ],
)
def test_what_the_system_does_not_give_while_the_input_is_read(error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught, reading_input(Path("out")):
        raise error
    assert text in str(caught.value) and type(caught.value) is kind


class Refused(DurableFiles):
    """Takes no shard from number `first` on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def link(self, source: Path, target: Path) -> None:
        if target.name.startswith("part-") and shard_number(target.name) >= self.first:
            raise an_error(errno.EIO)
        super().link(source, target)


def test_two_starts_in_a_row_that_commit_nothing_end_in_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out, told = tmp_path / "rows.jsonl", tmp_path / "out", list[str]()
    rows.write_text("".join(json.dumps({"question": f"What is {row}?"}) + "\n" for row in range(6)))
    job = scripted_job(rows, out, output={"path": str(out), "rows_per_shard": 3})

    class Display(NullProgress):
        def message(self, text: str) -> None:
            told.append(text)

    def start(first: int, **flags: bool) -> tuple[int, bool]:
        told.clear()
        with monkeypatch.context() as patch, scripted_engine():
            patch.setattr(folder_module, "DurableFiles", lambda: Refused(first))
            summary = run(job, Display(), **flags)
        assert json.loads((out / "summary.json").read_text())["exit_code"] == summary.exit_code
        return summary.exit_code, any("committed nothing either" in text for text in told)

    assert start(0) == (75, False)
    assert start(0) == start(0) == (2, True)
    assert start(0, overwrite=True) == (75, False)
    assert start(1) == (75, False), "it committed something"
    assert start(1) == (75, False)
    assert start(1) == (2, True)
    assert start(99) == (0, False)
    assert start(1) == (0, False)


def test_a_complete_run_is_not_tried_until_there_is_something_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"question": "What is 1?"}\n')
    assert scripted_run(rows, out).exit_code == 0
    before = (out / "_SUCCESS").read_bytes()
    monkeypatch.setattr(folder_module, "DurableFiles", lambda: Refusing("link", errno.EXDEV))
    assert scripted_run(rows, out).exit_code == 0
    with pytest.raises(OutputError, match="cannot be written: Invalid cross-device link"):
        scripted_run(rows, out, generation={"n": 3, "max_tokens": 6, "temperature": 1.0})
    assert (out / "_SUCCESS").read_bytes() == before


def test_names_of_folders_need_not_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    monkeypatch.chdir(place)
    rows, out = tmp_path / "rows.jsonl", Path("o")
    rows.write_text('{"question": "What is 1?"}\n')
    assert scripted_run(rows, out).exit_code == 0
    before = (out / "_SUCCESS").read_bytes()
    assert scripted_run(rows, out).exit_code == 0 and (out / "_SUCCESS").read_bytes() == before
    assert json.loads((out / "manifest.json").read_text())["working_folder"] == str(place)
    write_report(place / "o")
    assert (out / "report.html").read_bytes().count(rb"caf\udce9")
    (out / "data" / "part-00000.parquet").write_bytes(b"")
    assert str(check(place / "o").remedy).endswith("output.path=o --repair")
