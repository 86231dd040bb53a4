"""Leases: which writers count as alive, and what is renewed."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tokabatch.errors import OutputError
from tokabatch.output import leases
from tokabatch.output.claim import Claim
from tokabatch.output.leases import Holder, Leases
from tokabatch.storage.atomic_files import DurableFiles

HOLDER = Holder("task", "host", 1)


def test_a_holder_is_alive_where_its_lease_changed_between_two_looks_that_are_close(tmp_path: Path) -> None:
    now = 0.0
    with Claim(tmp_path / "out", writer="a") as one, Claim(tmp_path / "out", writer="b") as other:
        holder, reader = Leases(one, HOLDER, 60), Leases(other, HOLDER, 60, clock=lambda: now)
        path = one.folder.units / "3.lease"
        renewed = 1.0

        def look(seconds: float, *, renew: bool) -> bool:
            nonlocal now, renewed
            now += seconds
            if renew:
                renewed += 1
                os.utime(path, (renewed, renewed))
            assert not reader.take("3")
            return reader.is_alive("3")

        assert holder.take("3")
        assert not look(0, renew=False)
        assert not look(61, renew=True), "renewed once in a minute, perhaps long before its holder was killed"
        assert look(20, renew=True)
        assert look(20, renew=False), "a look that sees no change takes nothing back"
        assert not look(3600, renew=True), "what was seen an hour before says nothing of now"
        assert look(59, renew=True)
        now += 60
        assert reader.take("3"), "no change for as long as a lease lasts"
        assert not reader.is_alive("3")
        holder.close()
        reader.close()


def test_a_lease_that_cannot_be_renewed_keeps_no_other_from_being_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claim(tmp_path / "out", writer="a") as claim:
        held = Leases(claim, HOLDER, 0.15)
        assert held.take("first") and held.take("second")
        first, second = (claim.folder.units / f"{name}.lease" for name in ("first", "second"))
        gone, renew, before = first.stat().st_ino, os.utime, second.stat().st_mtime_ns

        def utime(descriptor: int) -> None:
            if os.fstat(descriptor).st_ino == gone:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            renew(descriptor)

        monkeypatch.setattr(os, "utime", utime)
        deadline = time.monotonic() + 60
        stale = first.stat().st_mtime_ns
        while second.stat().st_mtime_ns == before or second.stat().st_mtime_ns <= stale:
            assert time.monotonic() < deadline, "not renewed behind one that is gone"
            time.sleep(0.01)
        held.close()


def test_a_holder_that_hangs_renews_nothing_though_its_thread_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STANDSTILL_SECONDS", 100.0)
    now = 0.0
    with Claim(tmp_path / "out", writer="a") as claim:
        holder = Leases(claim, HOLDER, 0.03, clock=lambda: now)
        now = 99.0
        # Waiting for long to take it is no standstill.
        assert holder.take("input")
        path = claim.folder.units / "input.lease"

        def is_renewed() -> bool:
            before, deadline = path.stat().st_mtime_ns, time.monotonic() + 0.5
            while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
                time.sleep(0.01)
            return path.stat().st_mtime_ns != before

        now = 198.0
        assert is_renewed()
        now = 199.0
        time.sleep(0.1)
        assert not is_renewed()
        holder.sign()
        assert is_renewed()
        holder.close()


def test_a_lease_is_taken_whose_link_was_made_and_its_answer_lost(tmp_path: Path) -> None:
    class Lossy(DurableFiles):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            if target.suffix == ".lease":
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    with Claim(tmp_path / "out", Lossy(), writer="a") as one, Claim(tmp_path / "out", writer="b") as other:
        holder, second = Leases(one, HOLDER, 60), Leases(other, HOLDER, 60)
        assert holder.take("3") and not second.take("3")
        holder.drop("3")
        assert second.take("3") and not holder.take("3"), "another's is not taken for one's own"
        holder.close()
        second.close()


def test_of_two_that_find_a_lease_left_behind_the_later_one_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rename = 0.0, os.rename
    claims = [Claim(tmp_path / "out", writer=name) for name in "abc"]
    dead, first, second = (Leases(claim, HOLDER, 60, clock=lambda: now) for claim in claims)
    assert dead.take("3") and not first.take("3") and not second.take("3")
    now = 61.0
    dead.sign()

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert first.take("3"), "the other was faster"
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert not second.take("3")
    path = tmp_path / "out/_units/3.lease"
    assert path.exists() and path.stat().st_nlink == 1
    first.drop("3")
    assert not path.exists(), "it was the first one's still"
    assert not list((tmp_path / "out/_tmp").rglob("*.stale"))
    for each, claim in zip((dead, first, second), claims, strict=True):
        each.close()
        claim.release()


def test_what_is_no_lease_under_the_name_of_one_is_named(tmp_path: Path) -> None:
    with Claim(tmp_path / "out", writer="a") as claim:
        writer = Leases(claim, HOLDER, 60)
        folder, link, secret = (claim.folder.units / f"{name}.lease" for name in "123")
        folder.mkdir()
        link.symlink_to(link.name)
        secret.touch(mode=0)
        for name, place, why in (("1", folder, "Is a directory"), ("2", link, "Too many levels of symbolic links")):
            with pytest.raises(OutputError, match=f"{place} is in the place of a lease .*{why}. Move it away") as caught:
                writer.take(name)
            assert caught.value.exit_code == 2
        with pytest.raises(OutputError, match=f"{secret} .*Permission denied") if os.getuid() else nullcontext():
            writer.take("3")
        writer.close()
