"""Several writers of one folder: whichever dies, hangs or comes too late, nothing is lost, doubled or torn."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crash.conftest import Reference, Scene
from hypothesis import given, settings
from hypothesis import strategies as st
from support.faulty_files import CountedFiles
from support.forked_runs import ForkServer

from tokabatch.output.claim import Claim
from tokabatch.output.integrity import check
from tokabatch.output.shard_names import shard_number
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.status import Shares, read_shares
from tokabatch.output.units import Units

SCHEMA = pa.schema([("row_index", pa.int64()), ("sample_index", pa.int32()), ("status", pa.string())])
ROWS = 7
KILLS, SAMPLED_KILLS = 200, 4


class Died(Exception):
    """The writer's process ends here: nothing that it would do later happens."""


class Stepped(CountedFiles):
    """Makes one call whenever it is let: each is a place at which others may come in between."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.made = threading.Semaphore(0), threading.Semaphore(0)
        self.dead = False

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        self.made.release()
        self.turn.acquire()
        if self.dead:
            raise Died

    def names(self, folder: Path) -> list[str]:
        self.before("names", ())
        return super().names(folder)


class Writer:
    """One writer of unit 0 that reads what is there, adds the rest in shards of the sizes given, and begins anew when another
    was faster, until the unit is complete. It holds no lease: all of them own the unit at once."""

    def __init__(self, out: Path, name: str, sizes: list[int], units: Units) -> None:
        self.files = Stepped()
        self.lost = 0
        self._out, self._name, self._sizes, self._units = out, name, sizes, units
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.ended = not self._reached()

    def go_on(self, *, dead: bool = False) -> None:
        """Make one more call, or die in its place."""
        self.files.dead = self.files.dead or dead
        self.files.turn.release()
        self.ended = not self._reached()

    def _reached(self) -> bool:
        """Whether it stands before another call."""
        while not self.files.made.acquire(timeout=0.001):
            if not self.thread.is_alive() and not self.files.made.acquire(blocking=False):
                return False
        return True

    def _run(self) -> None:
        with suppress(Died):
            try:
                with Claim(self._out, self.files, writer=self._name) as claim:
                    claim.begin("run", {}, (), "")
                    while self._publish(claim):
                        self.lost += 1
            except Died:
                raise
            except BaseException as error:
                self.failure = error

    def _publish(self, claim: Claim) -> bool:
        """Whether another was faster."""
        shards = list(claim.folder.shards())
        there = {row for shard in shards for row in pq.read_table(shard.path)["row_index"].to_pylist()}
        left = [row for row in range(ROWS) if row not in there]
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=100, flush_seconds=3600, unit_of=self._units.of)
        writer.open(0, {shard_number(shard.path.name) for shard in shards}, len(left))
        while left and not writer.is_lost(0):
            size = self._sizes.pop() if self._sizes else len(left)
            rows, left = left[:size], left[size:]
            writer.take(pa.table([rows, [0] * len(rows), ["ok"] * len(rows)], schema=SCHEMA))
            writer.commit()
        return writer.is_lost(0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_order_writers_of_one_unit_come_in_each_sample_is_published_once(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("folder") / "out"
    units = Units(np.arange(ROWS + 1), np.zeros(ROWS, np.int32), 1)
    sizes = st.lists(st.integers(1, 3), max_size=4)
    writers = [Writer(out, f"w{number}", data.draw(sizes), units) for number in range(data.draw(st.integers(2, 3)))]
    deaths = 0
    while alive := [writer for writer in writers if not writer.ended]:
        # Long stretches of one, so that another sleeps through whole commits.
        writer = data.draw(st.sampled_from(alive))
        for _ in range(data.draw(st.integers(1, 40))):
            if not writer.ended:
                dead = deaths < 2 and data.draw(st.integers(0, 60)) == 0
                deaths += dead
                writer.go_on(dead=dead)
    for writer in writers:
        writer.thread.join()
        if writer.failure is not None:
            raise writer.failure
    if deaths:
        last = Writer(out, "last", [], units)
        while not last.ended:
            last.go_on()
        last.thread.join()
        assert last.failure is None
    found = [row for path in sorted((out / "data").glob("part-*")) for row in pq.read_table(path)["row_index"].to_pylist()]
    assert sorted(found) == list(range(ROWS))
    # The journals of all writers agree.
    with Claim(out, writer="reader") as claim:
        record = claim.folder.record()
        assert record is not None
        for shard in claim.folder.shards():
            known = record.versions[claim.folder.name_of(shard.path)]
            assert shard.digest() in [each.sha256 for each in known if each is not None]
        listed = {claim.folder.name_of(shard.path) for shard in claim.folder.shards()}
        assert {name for name, known in record.versions.items() if None not in known} <= listed


def signal_all(groups: Iterable[int], number: signal.Signals) -> None:
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, number)


def flags(task: str, lease: float = 1.5) -> dict[str, Any]:
    return {"shared": {"task": task, "units": 12, "lease_seconds": lease}}


def wait_until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "not reached"
        time.sleep(0.01)


def test_a_writer_that_stands_still_and_wakes_adds_nothing(
    servers: list[ForkServer], long_scene: Scene, undisturbed: Reference, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Slow, and with few commits: much is computed and not committed when it stops.
    job = long_scene.job(out, output={"rows_per_shard": 10, "flush_seconds": 3600})
    stopped = servers[0].start(job, apart=True, flags=flags("sleeper"), step_seconds=0.01)
    wait_until(lambda: bool(list((out / "data").glob("part-*"))))
    os.killpg(stopped, signal.SIGSTOP)
    shares = read_shares(out, time.time())
    assert shares is not None and shares.units > 6 > shares.complete
    assert [task.name for task in shares.tasks] == ["sleeper"] and shares.tasks[0].units
    ended = servers[1].run(job, apart=True, flags=flags("heir"))
    assert ended.code == 0, ended.message
    assert (out / "_SUCCESS").exists() and long_scene.checker.check(out) == long_scene.checker.samples
    os.killpg(stopped, signal.SIGCONT)
    woken = servers[0].wait()
    assert woken.code in (0, 75), woken
    assert "was published first by another task" in woken.message
    assert servers[1].run(job, apart=True, flags=flags("third")).code == 0
    assert read_shares(out, time.time()) == Shares(shares.units, shares.units, ())
    long_scene.checker.check_complete(out, undisturbed(long_scene))


def test_another_makes_the_input_where_its_maker_stands_still(
    servers: list[ForkServer], short_scene: Scene, undisturbed: Reference, tmp_path: Path
) -> None:
    for attempt in range(20):
        out = tmp_path / str(attempt)
        maker = servers[0].start(short_scene.job(out), apart=True, flags=flags("maker"))
        wait_until((out / "_units/input.lease").exists)
        os.killpg(maker, signal.SIGSTOP)
        if not (out / "manifest.json").exists():
            break
        # It was faster.
        os.killpg(maker, signal.SIGCONT)
        servers[0].wait()
    assert not (out / "manifest.json").exists()
    ended = servers[1].run(short_scene.job(out), apart=True, flags=flags("heir", lease=0.5))
    assert ended.code == 0 and (out / "_SUCCESS").exists(), ended
    os.killpg(maker, signal.SIGCONT)
    assert servers[0].wait().code == 0
    short_scene.checker.check_complete(out, undisturbed(short_scene))
    assert not list(out.rglob("*.lease"))


def test_a_complete_run_of_one_process_stays_as_it_is(server: ForkServer, short_scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert server.run(short_scene.job(out)).code == 0

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = content()
    for task in ("one", "two"):
        ended = server.run(short_scene.job(out), apart=True, flags=flags(task))
        assert ended.code == 0, ended.message
    assert content() == before
    short_scene.checker.check_complete(out)


def test_writers_killed_at_any_instant_lose_double_and_tear_nothing(
    servers: list[ForkServer], long_scene: Scene, undisturbed: Reference, tmp_path: Path, all_faults: bool
) -> None:
    """Two at a time, each killed and started again by itself."""
    draw, count, kills = random.Random(5), KILLS if all_faults else SAMPLED_KILLS, 0
    folders = 0
    while kills < count:
        folders += 1
        out, running = tmp_path / str(folders), dict[int, int]()
        job = long_scene.job(out)
        for _ in range(4):
            for number, server in enumerate(servers):
                if number not in running:
                    running[number] = server.start(job, apart=True, flags=flags(f"task {number}", lease=0.5))
            time.sleep(draw.uniform(0, 1.2))
            victim = draw.randrange(len(servers))
            with suppress(ProcessLookupError):
                os.killpg(running.pop(victim), signal.SIGKILL)
            ended = servers[victim].wait()
            assert ended.signal == signal.SIGKILL or ended.code == 0, ended
            kills += ended.signal is not None
            # The other one continues once the folder has been checked.
            signal_all(running.values(), signal.SIGSTOP)
            long_scene.checker.check(out)
            signal_all(running.values(), signal.SIGCONT)
        for number in running:
            ended = servers[number].wait()
            assert ended.code in (0, 75), ended
        ended = servers[0].run(job, apart=True, flags=flags("last", lease=0.5))
        assert ended.code == 0, ended
        long_scene.checker.check_complete(out, undisturbed(long_scene))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (remove, "_units"),
        (remove, "_units/*"),
        (remove, "_units/plan-*"),
        (truncate, "_units/plan-*"),
        (remove, "_units/commits-*"),
    ],
)
def test_what_several_writers_keep_beside_the_shards_is_written_again_in_mid_run(
    servers: list[ForkServer],
    long_scene: Scene,
    undisturbed: Reference,
    tmp_path: Path,
    harm: Callable[[Path], None],
    names: str,
) -> None:
    out = tmp_path / "out"
    job = long_scene.job(out)
    running = [server.start(job, apart=True, flags=flags(str(i)), step_seconds=0.01) for i, server in enumerate(servers)]
    wait_until(lambda: len(list((out / "_units").glob("commits-*"))) == 2 and len(list((out / "data").glob("part-*"))) > 8)
    signal_all(running, signal.SIGSTOP)
    assert not (out / "_SUCCESS").exists()
    for path in out.glob(names):
        harm(path)
    signal_all(running, signal.SIGCONT)
    for ended in [server.wait() for server in servers]:
        # Where a file is gone in the middle of a commit, the task ends and is run again.
        assert ended.code in (0, 75), ended
    ended = servers[0].run(job, apart=True, flags=flags("last"))
    assert ended.code == 0, ended
    long_scene.checker.check_complete(out, undisturbed(long_scene))
    assert check(out).exit_code == 0


@pytest.mark.parametrize(
    ("harm", "names", "recorded"),
    [
        (remove, "_units/plan-*", True),
        (truncate, "_units/plan-*", True),
        (remove, "_units", False),
        (move, "_units", False),
        (remove, "_units/commits-one*", False),
    ],
)
def test_what_ended_writers_recorded_is_computed_again_by_one_command(
    servers: list[ForkServer],
    long_scene: Scene,
    undisturbed: Reference,
    tmp_path: Path,
    harm: Callable[[Path], None],
    names: str,
    recorded: bool,
) -> None:
    """The units are made again from the plan; digests are not made from what is there."""
    out = tmp_path / "out"
    job = long_scene.job(out)
    for server, task in zip(servers, ("one", "two"), strict=True):
        group, before = (
            server.start(job, apart=True, flags=flags(task, lease=0.5), step_seconds=0.01),
            len(list(out.glob("data/*"))),
        )
        wait_until(lambda before=before: len(list(out.glob("data/part-*"))) > before + 3)
        signal_all([group], signal.SIGKILL)
        server.wait()
    for path in out.glob(names):
        harm(path)
    shutil.rmtree(out / "elsewhere", ignore_errors=True)
    if not recorded:
        found = check(out)
        assert found.exit_code == 4 and found.remedy is not None and found.remedy.endswith(f"output.path={out} --repair")
        for shared in ({}, flags("three", lease=0.5), flags("three", lease=0.5)):
            ended = servers[0].run(job, apart=True, flags=shared)
            assert ended.code == 4 and ("tokabatch check" in ended.message or "--repair" in ended.message), ended
        ended = servers[0].run(job, apart=True, flags={"repair": True})
        assert ended.code == 0, ended
    ended = servers[0].run(job, apart=True, flags=flags("last", lease=0.5))
    assert ended.code == 0, ended
    long_scene.checker.check_complete(out, undisturbed(long_scene))
    assert check(out).exit_code == 0


@pytest.mark.parametrize("harm", [remove, move])
def test_the_folder_of_shards_that_is_taken_away_in_mid_run_is_named(
    server: ForkServer, long_scene: Scene, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    task = server.start(long_scene.job(out), apart=True, flags=flags("one"), step_seconds=0.01)
    wait_until(lambda: len(list((out / "data").glob("part-*"))) > 4)
    os.killpg(task, signal.SIGSTOP)
    harm(out / "data")
    os.killpg(task, signal.SIGCONT)
    ended = server.wait()
    assert ended.code == 75 and f"{out / 'data'} was moved, replaced or removed" in ended.message, ended
