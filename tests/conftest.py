"""Tests marked `gpu` run where torch sees one. In CI the property tests try the same examples every time: a counterexample that
is new should not turn up in somebody's unrelated change."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from dataclasses import replace
from functools import cache

import hypothesis
import pytest
import torch

from tokabatch.forecast.devices import Device
from tokabatch.forecast.processor import measure_processor

hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_configure() -> None:
    """Let the programs under test get Ctrl-C: a session started in the background ignores it, and they would inherit that.
    One thread for each process: those of several workers, replicas and ranks would spin against each other."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="tests/crash: every fault, not a sample of them (minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: what starts last then ends soon, and keeps no core waiting.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _processor_measured_once() -> Generator[None]:
    """The end of a run measures the processor for 0.1 s, much of what a small run takes."""
    measured = cache(lambda: measure_processor(0.0))

    def remembered(memory: float) -> Device:
        return replace(measured(), memory=memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokabatch.forecast.cost_model.measure_processor", remembered)
        yield
