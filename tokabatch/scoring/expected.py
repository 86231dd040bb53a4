"""What a verifier of the package expected of a row, for people who look at its verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from tokabatch.job.verify import verifier_names


def expected_answers(verify: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Return the right answers to a row, by the section `verify` of its job, as texts that its verifier's `expected` gives;
    none for a judge of one's own, or where the row does not have its columns any more."""
    if verify.get("kind") not in verifier_names():
        return []
    try:
        module = import_module(f"tokabatch.scoring.verifiers.{verify['kind']}")
        if not hasattr(module, "expected"):
            return []
        options = {"answer": verify.get("answer"), **verify.get("options", {})}
        named = signature(module.expected).parameters
        return module.expected(row, **{name: value for name, value in options.items() if name in named and value is not None})
    except (ImportError, LookupError, TypeError, ValueError):
        return []
