"""Verifiers: is a sample's text right, given the row's reference answer?

A verifier is one file of this folder; its name is the `verify.kind` of the job. It holds
`verify(text: str, reference: Any) -> bool`, which raises ValueError, saying why, where the reference is none that it
understands (null, or no number where it compares numbers). A text that it does not understand is wrong, never an error.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from tokabatch.errors import JobError

Verify = Callable[[str, Any], bool]


def kinds() -> tuple[str, ...]:
    """The names of all verifiers, sorted."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


def load_verifier(kind: str) -> Verify:
    """The verifier of that name. Raises JobError naming the nearest for one that does not exist."""
    if kind not in kinds():
        nearest = get_close_matches(kind, kinds(), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(kinds())}."
        raise JobError(f"verify.kind {kind!r} does not exist; {hint}")
    return import_module(f"{__name__}.{kind}").verify
