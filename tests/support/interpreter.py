"""Where Triton kernels are tested: on a GPU, or, without one, in Triton's interpreter on CPU tensors.

The interpreter has to be chosen before Triton is imported, so `test_interpreted_kernels` runs those tests in a process of its
own; elsewhere the variable is not set, and they are GPU tests.
"""

from __future__ import annotations

import os
from importlib import metadata, util

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETING else [pytest.param("cuda", marks=pytest.mark.gpu)]


def interpreter_works() -> bool:
    """Seen with Triton 3.9 and NumPy 2.4. That of 3.6 cannot loop up to a loaded number with such a NumPy."""
    return util.find_spec("triton") is not None and tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 9)
