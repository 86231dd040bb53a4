"""Every system call of the commit path fails, is cut short, or is the last one before death, in turn: n = 0, 1, 2, ... until
none is left. Whatever happens, what is committed is whole, and the same command ends in the table of an undisturbed run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crash.conftest import Reference, Scene, share
from support.forked_runs import Ended, ForkServer

SAMPLED_FAULTS = 30
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
    Kind("power cut, names lost", {"kind": "power", "names_survive": False}),
    Kind("power cut, names kept", {"kind": "power", "names_survive": True}),
]


@dataclass(frozen=True)
class Point:
    kind: Kind
    at: int

    @property
    def fault(self) -> dict[str, Any]:
        return {**self.kind.fault, "at": self.at}


def points(calls: tuple[str, ...]) -> list[Point]:
    return [Point(kind, at) for kind in KINDS for at, call in enumerate(calls) if kind.only in (None, call)]


class Sweep:
    """Goes through points of one scene; each has a folder of its own."""

    def __init__(self, scene: Scene, reference: list[dict[str, Any]], folder: Path, mutant: str | None = None) -> None:
        self.scene, self.reference, self.folder, self.mutant = scene, reference, folder, mutant

    def work(self, server: ForkServer, point: Point) -> None:
        out = self.folder / f"{point.kind.name} {point.at}"
        job, checker = self.scene.job(out), self.scene.checker
        ended = server.run(job, fault=point.fault, mutant=self.mutant, step_seconds=0)
        try:
            expect(ended, point)
            committed = checker.check(out)
            if ended.code == 0:
                checker.check_complete(out, self.reference)
            again = server.run(job, mutant=self.mutant, step_seconds=0)
            assert again.code == 0, again
            checker.check_complete(out, self.reference)
            assert committed <= checker.samples
        except AssertionError as error:
            raise AssertionError(f"{point}: {error}; {ended}") from error


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


def test_every_call_fails_or_is_the_last_one(
    servers: list[ForkServer], short_scene: Scene, undisturbed: Reference, tmp_path: Path, all_faults: bool
) -> None:
    reference = undisturbed(short_scene)
    calls = servers[0].run(short_scene.job(tmp_path / "calls"), step_seconds=0).calls
    assert {"open_new", "write", "fsync", "close", "link", "replace", "open_folder", "make_folder", "remove"} <= set(calls)
    chosen = points(calls)
    if not all_faults:
        chosen = random.Random(0).sample(chosen, SAMPLED_FAULTS)
    share(servers, chosen, Sweep(short_scene, reference, tmp_path).work)
    # Beyond the last call nothing is left to go wrong.
    for kind in KINDS:
        ended = servers[0].run(short_scene.job(tmp_path / kind.name), fault={**kind.fault, "at": len(calls)}, step_seconds=0)
        assert ended.code == 0, (kind, ended)
        short_scene.checker.check_complete(tmp_path / kind.name, reference)
