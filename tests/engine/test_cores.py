"""How many cores a process may use, under quotas as containers and Slurm set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokabatch.cores import usable_cores

V1 = (("quota", "400000"), ("period", "100000"))


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/slurm/job", {"slurm/cpu.max": "200000 100000", "slurm/job/cpu.max": "max 100000"}, 2),
        ("0::/outside", {"cpu.max": "50000 100000"}, 1),
        ("3:cpuacct,cpu:/box\n0::/", {f"cpu/box/cpu.cfs_{name}_us": text for name, text in V1}, 4),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("2:cpuset:/", {"cpuset/cpu.max": "100000 100000"}, 16),
        ("", {}, 16),
    ],
)  # fmt: skip
def test_quotas_of_all_groups_count(
    lines: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(lines)
    assert usable_cores(tmp_path / "groups", tmp_path / "own") == cores
    assert usable_cores(tmp_path / "groups", tmp_path / "none") == 16
