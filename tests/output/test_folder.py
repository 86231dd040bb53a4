"""What one of several writers leaves alone, and what it does where another took the folder over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokabatch.errors import CommitError
from tokabatch.output.folder import Claim


def begin(out: Path) -> Claim:
    """A writer of a run that is marked as complete, beside one whose lock it does not see."""
    claim = Claim(out, writer="mine")
    claim.begin("run", {}, (), "")
    for path in (out / "_tmp" / "other" / "part-00003-00000.parquet", out / "_input" / "tokens.bin", out / "_SUCCESS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return claim


@pytest.mark.parametrize("joiner", [False, True])
def test_what_others_left_unfinished_and_the_input_are_the_joiners_to_remove(tmp_path: Path, joiner: bool) -> None:
    out = tmp_path / "out"
    claim = begin(out)
    assert claim.take_alone()
    claim.clears = joiner
    claim.release()
    assert not (out / "_tmp" / "mine").exists()
    assert (out / "_tmp" / "other" / "part-00003-00000.parquet").exists() != joiner
    assert (out / "_input" / "tokens.bin").exists() != joiner
    assert joiner != (out / "_tmp").exists()


def test_a_journal_that_was_taken_away_is_not_written_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with begin(out) as claim:
        journal = out / "_units" / "commits-mine.jsonl"
        claim.check_folder()
        journal.write_bytes(b"touched")
        claim.check_folder()
        assert journal.read_bytes() != b"touched"
        journal.unlink()
        with pytest.raises(CommitError, match=r"commits-mine\.jsonl was removed"):
            claim.check_folder()
        assert not journal.exists()
