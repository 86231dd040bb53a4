"""The GPU's Triton kernels on a machine without a GPU: their tests, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.interpreter import INTERPRETING, interpreter_works

TESTS = Path(__file__).parent
KERNELS = {
    "model": ("model/sampling/test_triton_sampling.py", "model/test_triton_layers.py"),
    "attention": ("attention/test_triton_decode.py", "attention/test_backends.py", "attention/test_tiles.py"),
    "engine": ("engine/test_captured.py",),
}
"""The files of one process: each has to import torch and transformers again."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETING, reason="the kernels themselves are tested")
@pytest.mark.skipif(not interpreter_works(), reason="needs Triton 3.9, whose interpreter knows this NumPy")
@pytest.mark.parametrize("room", KERNELS)
def test_the_kernels_hold_in_the_interpreter(room, tmp_path):
    # What needs no kernel is tested without the interpreter.
    chosen = ["-k", "cpu or interpreted", *(str(TESTS / file) for file in KERNELS[room])]
    options = ["-v", "-x", "-rs", "-W", "ignore", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    command = [sys.executable, "-m", "pytest", *options, *chosen]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in KERNELS[room]:
        assert re.search(rf"{file} \S*\.", done.stdout), f"nothing of {file} has passed: {done.stdout}"
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("needs a CUDA device" in line for line in skipped), skipped
