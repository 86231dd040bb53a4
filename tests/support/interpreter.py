"""Where Triton kernels are tested: on a GPU, or, without one, in Triton's interpreter on CPU tensors.

The interpreter has to be chosen before Triton is imported, so `test_interpreted_kernels` runs those tests in a process of its
own; elsewhere the variable is not set, and they are GPU tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata, util
from typing import Any

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETING else [pytest.param("cuda", marks=pytest.mark.gpu)]


def interpreter_works() -> bool:
    """Seen with Triton 3.9 and NumPy 2.4. That of 3.6 cannot loop up to a loaded number with such a NumPy."""
    return util.find_spec("triton") is not None and tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 9)


def _patch_once_a_launch() -> None:
    """A launch puts the interpreter's functions in the place of those of `triton.language`. Each function that the kernel calls
    would do that again, to the same effect, in half of the time that a test takes."""
    interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language")
    patch, launch, nothing = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope()
    patched = set[str]()

    @cache
    def modules_of(function: Callable[..., Any]) -> frozenset[str]:
        seen = function.__globals__.values()
        return frozenset(each.__name__ for each in (language, language.core) if any(value is each for value in seen))

    def patch_what_is_not(function: Callable[..., Any]) -> Any:
        if modules_of(function) <= patched:
            return nothing
        patched.update(modules_of(function))
        return patch(function)

    def launch_unpatched(self: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_not, launch_unpatched


if INTERPRETING and interpreter_works():
    _patch_once_a_launch()
