"""The small shards of several starts are joined when the run completes: whatever call fails or is the last one, every row is
there once, at each moment and for any reader, and the folder is one that `verify` takes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from crash.conftest import Reference, Scene, share
from crash.test_system_calls import COURSES, KINDS, Point, Sweep, expect
from support.forked_runs import ForkServer

from tokabatch.output.integrity import check

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]
SAMPLED_FAULTS = 20


def test_every_call_of_the_joining_fails_or_is_the_last_one(
    servers: list[ForkServer], short_scene: Scene, undisturbed: Reference, tmp_path: Path, all_faults: bool
) -> None:
    sweep = Sweep(short_scene, undisturbed(short_scene), tmp_path, COURSES[1])
    calls = sweep.calls(servers[0])
    begin = max(at for at, call in enumerate(calls[: calls.index("exchange")]) if call == "make_folder")
    committed = short_scene.checker.samples

    def work(server: ForkServer, point: Point) -> None:
        out = tmp_path / f"{point.kind.name} {point.at}"
        sweep.prepare(server, out)
        assert len(list((out / "data").iterdir())) == 2
        expect(sweep.run(server, out, point.fault), point)
        assert short_scene.checker.check(out) == committed, f"{point}: what was committed is not there"
        found = check(out)
        assert found.exit_code in (0, 75) and found.books.pending == 0, f"{point}: {found}"
        again = sweep.run(server, out)
        assert again.code == 0, f"{point}: {again}"
        short_scene.checker.check_complete(out, sweep.reference)
        assert check(out).exit_code == 0
        shutil.rmtree(out)

    points = [Point(kind, at) for kind in KINDS for at in range(begin, len(calls)) if kind.only in (None, calls[at])]
    share(servers, points if all_faults else random.Random(0).sample(points, SAMPLED_FAULTS), work)
    assert len(list((tmp_path / "calls" / "data").iterdir())) == 3, "ten samples, four in a shard"
