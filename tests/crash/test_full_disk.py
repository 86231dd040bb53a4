"""A disk of two megabytes that fills up in the middle of a run, and is then given room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from crash.conftest import Scene
from support.forked_runs import ForkServer

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, empty."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def ballast(disk: Path, leave: int) -> Path:
    """A file that leaves this many bytes free."""
    path = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    path.write_bytes(b"\0" * (free - leave))
    return path


def test_a_disk_that_fills_up_stops_the_run_and_room_completes_it(disk: Path, long_scene: Scene, server: ForkServer) -> None:
    out = disk / "out"
    filler = ballast(disk, leave=320 << 10)  # 60 shards of at least 8 KB do not fit
    ended = server.run(long_scene.job(out), step_seconds=0)
    assert ended.code == 75, ended
    committed = long_scene.checker.check(out)
    assert 0 < committed < long_scene.checker.samples and not (out / "_SUCCESS").exists()
    # Those below half the usual size may be joined at the end.
    before = {path.name: path.read_bytes() for path in (out / "data").iterdir() if pq.read_metadata(path).num_rows > 4}
    full = server.run(long_scene.job(out), step_seconds=0)
    assert full.code == 75 or (full.code == 2 and "Make room there" in full.message), full
    filler.unlink()
    assert server.run(long_scene.job(out), step_seconds=0).code == 0
    long_scene.checker.check_complete(out)
    after = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    assert before.items() <= after.items()


def test_a_disk_that_is_full_at_the_start_refuses_the_job(disk: Path, long_scene: Scene, server: ForkServer) -> None:
    ballast(disk, leave=4096)
    ended = server.run(long_scene.job(disk / "out"), step_seconds=0)
    assert ended.code == 2 and "No space left on device" in ended.message and "output.path" in ended.message
    assert sorted(path.name for path in disk.iterdir()) == ["ballast"]


def test_a_folder_that_cannot_be_written_refuses_the_job(tmp_path: Path, long_scene: Scene, server: ForkServer) -> None:
    (tmp_path / "file").write_text("")
    ended = server.run(long_scene.job(tmp_path / "file" / "out"), step_seconds=0)
    assert ended.code == 2 and "cannot be written" in ended.message
