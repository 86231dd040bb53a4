"""Verifiers: is a sample's text right, given the row's reference answer?

A verifier is one file of this folder; its name is the `verify.kind` of the job. It holds
`verify(text: str, reference: Any) -> bool`, which raises ValueError, saying why, where the reference is none that it
understands (null, or no number where it compares numbers). A text that it does not understand is wrong, never an error.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tokabatch.job import verifier_names

Verify = Callable[[str, Any], bool]


def load_verifier(kind: str) -> Verify:
    """The verifier of that name, one of `job.verifier_names()`: a job that names another does not load."""
    assert kind in verifier_names(), kind
    return import_module(f"{__name__}.{kind}").verify
