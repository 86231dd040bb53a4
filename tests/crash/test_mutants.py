"""The checks are checked: with one line of the commit path broken, the faults of the other tests must be seen to do harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from crash.conftest import Reference, Scene
from crash.test_system_calls import COURSES, Sweep, points
from support.forked_runs import ForkServer
from support.mutants import MUTANTS

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]

NEW, MORE, _, AFRESH = COURSES
SEEN_BY = {
    "no_fsync_of_files": (NEW, "power cut, names kept", "remove"),
    "no_fsync_of_folders": (NEW, "power cut, names of shards lost", "replace"),
    "written_under_the_final_name": (NEW, "kill within", "write"),
    "committed_keys_not_read_back": (NEW, "kill after", "link"),
    "a_failed_commit_forgets_its_rows_and_goes_on": (NEW, "EIO", "link"),
    "success_stays_while_the_run_goes_on": (MORE, "kill before", "link"),
    "success_is_marked_before_the_shards_are_there": (NEW, "kill before", "link"),
    "small_shards_are_joined_name_by_name": (MORE, "kill before", "remove"),
    "overwrite_deletes_the_manifest_first": (AFRESH, "kill after", "remove"),
}
"""The course, the fault and the system call that show the harm."""


def test_every_mutant_is_tried() -> None:
    assert set(SEEN_BY) == set(MUTANTS)


@pytest.mark.parametrize("mutant", SEEN_BY)
def test_a_broken_commit_is_seen(
    mutant: str, server: ForkServer, short_scene: Scene, undisturbed: Reference, tmp_path: Path
) -> None:
    course, kind, call = SEEN_BY[mutant]
    sweep = Sweep(short_scene, undisturbed(short_scene), tmp_path, course, mutant)
    calls = sweep.calls(server)
    chosen = [point for point in points(calls) if point.kind.name == kind and calls[point.at] == call]
    # The marks of the end are handled in the last calls, those of the run before in the first.
    chosen = chosen if course is AFRESH else list(reversed(chosen))
    with pytest.raises(AssertionError):
        for point in chosen:
            sweep.work(server, point)
