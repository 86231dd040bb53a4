"""Tests marked `gpu` run where torch sees one. In CI the property tests try the same examples every time: a counterexample that
is new should not turn up in somebody's unrelated change."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_configure() -> None:
    """Let the programs under test get Ctrl-C: a session started in the background ignores it, and they would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="tests/crash: every fault, not a sample of them (minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
