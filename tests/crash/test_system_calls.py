"""Every system call of the commit path fails, is cut short, or is the last one before death, in turn: n = 0, 1, 2, ... until
none is left. Whatever happens, what is committed is whole, and the same command ends in the table of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash.conftest import Reference, Scene, share
from support.forked_runs import Ended, ForkServer

SAMPLED_FAULTS = 8
POWER_CUT = 99
pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Kind:
    """One way for a system call to go wrong. `only` is the call that it applies to, if not to all."""

    name: str
    fault: dict[str, Any]
    only: str | None = None


KINDS = [
    *(Kind(code, {"kind": "failing", "error": code}) for code in ("ENOSPC", "EIO", "EACCES")),
    Kind("ENOSPC from then on", {"kind": "lasting", "error": "ENOSPC"}),
    Kind("short write", {"kind": "short", "error": "EINTR"}, "write"),
    Kind("short write, then ENOSPC", {"kind": "short", "error": "ENOSPC"}, "write"),
    Kind("kill before", {"kind": "kill", "moment": "before"}),
    Kind("kill within", {"kind": "kill", "moment": "within"}, "write"),
    Kind("kill after", {"kind": "kill", "moment": "after"}),
    Kind("power cut, names lost", {"kind": "power", "lose": "all"}),
    Kind("power cut, names of shards lost", {"kind": "power", "lose": "data"}),
    Kind("power cut, names kept", {"kind": "power", "lose": "none"}),
]


@dataclass(frozen=True)
class Point:
    kind: Kind
    at: int

    @property
    def fault(self) -> dict[str, Any]:
        return {**self.kind.fault, "at": self.at}


def points(calls: tuple[str, ...]) -> list[Point]:
    """Every call, with each kind that applies to it."""
    return [Point(kind, at) for kind in KINDS for at, call in enumerate(calls) if kind.only in (None, call)]


@dataclass(frozen=True)
class Course:
    """What the faulted run does: `before` it, another one went well, with other sections of the job; `flags` are its own."""

    name: str
    before: dict[str, Any] | None = None
    flags: dict[str, bool] = field(default_factory=dict)


COURSES = [
    Course("a new run"),
    Course("more samples", before={"generation": {"n": 1}}),
    Course("error rows again", before={}, flags={"retry_errors": True}),
    Course("afresh", before={"generation": {"n": 1, "seed": 1}}, flags={"overwrite": True}),
]


class Sweep:
    """Goes through points of one course; each has a folder of its own."""

    def __init__(
        self,
        scene: Scene,
        reference: list[dict[str, Any]],
        folder: Path,
        course: Course = COURSES[0],
        mutant: str | None = None,
    ) -> None:
        self.scene, self.reference, self.folder, self.course, self.mutant = scene, reference, folder, course, mutant

    def run(self, server: ForkServer, out: Path, fault: dict[str, Any] | None = None) -> Ended:
        job, wrong = self.scene.job(out), {"mutant": self.mutant, "flags": self.course.flags}
        return server.run(job, fault=fault, step_seconds=0, **wrong)

    def prepare(self, server: ForkServer, out: Path) -> None:
        if self.course.before is not None:
            ended = server.run(self.scene.job(out, **self.course.before), step_seconds=0)
            assert ended.code == 0, ended

    def calls(self, server: ForkServer) -> tuple[str, ...]:
        self.prepare(server, self.folder / "calls")
        return self.run(server, self.folder / "calls").calls

    def work(self, server: ForkServer, point: Point) -> None:
        out = self.folder / f"{point.kind.name} {point.at}"
        checker = self.scene.checker
        self.prepare(server, out)
        ended = self.run(server, out, point.fault)
        try:
            expect(ended, point)
            checker.check(out)
            if ended.code == 0:
                checker.check_complete(out, self.reference)
            again = self.run(server, out)
            assert again.code == 0, again
            checker.check_complete(out, self.reference)
        except AssertionError as error:
            raise AssertionError(f"{self.course.name}: {point}: {error}; {ended}") from error
        shutil.rmtree(out)


def expect(ended: Ended, point: Point) -> None:
    """A fault ends in what the README says of it, never in a traceback."""
    kind = point.fault["kind"]
    if kind == "kill":
        assert ended.signal == 9
    elif kind == "power":
        assert ended.code == POWER_CUT
    else:
        assert ended.code in (0, 2, 75)
        assert ended.code != 2 or "output.path" in ended.message


@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.name)
def test_every_call_fails_or_is_the_last_one(
    course: Course,
    servers: list[ForkServer],
    short_scene: Scene,
    undisturbed: Reference,
    tmp_path: Path,
    all_faults: bool,
) -> None:
    sweep = Sweep(short_scene, undisturbed(short_scene), tmp_path, course)
    calls = sweep.calls(servers[0])
    assert {"open_new", "write", "fsync", "close", "link", "replace", "open_folder", "make_folder", "remove"} <= set(calls)
    chosen = points(calls)
    if not all_faults:
        chosen = random.Random(course.name).sample(chosen, SAMPLED_FAULTS)
    elif course is not COURSES[0]:
        # The commit is the same: every call again, with one kind each in turn.
        chosen = [point for point in chosen if KINDS.index(point.kind) == point.at % len(KINDS)]
    share(servers, chosen, sweep.work)
    # Beyond the last call nothing is left to go wrong.
    for kind in KINDS if all_faults else KINDS[:1]:
        sweep.prepare(servers[0], tmp_path / kind.name)
        ended = sweep.run(servers[0], tmp_path / kind.name, {**kind.fault, "at": len(calls)})
        assert ended.code == 0, (kind, ended)
        short_scene.checker.check_complete(tmp_path / kind.name, sweep.reference)
