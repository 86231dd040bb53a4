"""The program that a real Slurm and a real Ray start, without either: what breaks it shows within seconds, and anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from crash.conftest import Scene

PROGRAM = Path(__file__).parent / "scripted_tokabatch.py"


def test_it_completes_a_job_and_notes_each_sample_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ["What is 1?", "What is 2?", None, "What is 3?"], n=4, rows_per_shard=2, flush_seconds=0.5)
    job, notes, out = tmp_path / "job.json", tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    job.write_text(json.dumps(scene.job(out)))
    command = [sys.executable, str(PROGRAM), "0", str(notes), "run", str(job), "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    scene.checker.check_complete(out)
    finished = [line for path in notes.iterdir() for line in path.read_text().splitlines()]
    assert sorted(finished) == sorted(f"{row} {sample}" for row in (0, 1, 3) for sample in range(4))
