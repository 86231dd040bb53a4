"""Verifiers: is a sample's text right, given the row's reference answer?

A verifier is one file: one of this folder, whose name is the `verify.kind` of the job, or any other, whose path it is. It holds
`verify(text: str, reference: Any) -> bool`, which raises ValueError, saying why, where the reference is none that it
understands (null, or no number where it compares numbers). A text that it does not understand is wrong, never an error.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

from tokabatch.errors import JobError
from tokabatch.job import verifier_names, verifier_path

Verify = Callable[[str, Any], bool]


def load_verifier(kind: str) -> Verify:
    """The verifier that `verify.kind` means; a file is run anew each time. Raises JobError for a file that gives none."""
    if kind in verifier_names():
        return import_module(f"{__name__}.{kind}").verify
    try:
        verify = runpy.run_path(str(verifier_path(kind))).get("verify")
    except (Exception, SystemExit) as error:
        raise JobError(f"verify.kind: {kind} cannot be loaded ({type(error).__name__}: {error}). Mend the file.") from error
    if not callable(verify):
        raise JobError(f"verify.kind: {kind} has no function `verify(text, reference)`. Add one.")
    return cast("Verify", verify)
