"""The page of a run: everything in one file, and the figures that belong to what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tokabatch.report.page import PassCurve, RunRecord, render_page

STEPS = {
    name: np.linspace(1, 50, 60)
    for name in ("seconds", "running", "waiting", "pages", "capacity", "tokens", "sampled", "decoded", "finished")
}
SUMMARY = {
    "steps": 60,
    "seconds": 40.0,
    "load_seconds": 2.0,
    "output_tokens": 5000,
    "output_tokens_per_second": 131.6,
    "prompt_tokens": 900,
    "cached_tokens": 700,
    "cacheable_tokens": 720,
    "prefilled_tokens": 210,
    "step_seconds": 38.0,
    "tail_seconds": 3.8,
    "predicted_seconds": 30.0,
    "predicted_by": "the roofline of <this>",
    "preemptions": 3,
}
RUN = RunRecord(
    path="out/<b>",
    model="a model",
    state="complete",
    samples=20,
    ok=18,
    errors=1,
    lengths=np.arange(1, 19, dtype=np.int32),
    summary=SUMMARY,
    steps=STEPS,
    pass_band=PassCurve((1, 2), (0.4, 0.6), (0.3, 0.5), (0.5, 0.7)),
)


def test_a_page_stands_alone_and_escapes_what_it_is_given():
    page = render_page(RUN)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page and "<link" not in page and "src=" not in page
    assert "out/&lt;b&gt;" in page and "<b>out" not in page
    assert "by the roofline of &lt;this&gt;" in page and "last start" not in page
    assert "output tokens, last start" in render_page(replace(RUN, summary={**SUMMARY, "earlier": 5}))


def test_every_figure_of_a_whole_run_is_there():
    page = render_page(RUN)
    titles = ("Throughput", "KV cache in use", "Samples running and waiting", "Output lengths", "pass@k", "Prompt tokens")
    for title in (*titles, "Predicted and actual"):
        assert f"<figcaption>{title}" in page
    assert page.count("<svg") == 7
    for fact in ("97.2%", "132", "pass@2", "pending", "40.0 s"):
        assert fact in page
    assert len(page) < 400_000


@pytest.mark.parametrize("missing", ["steps", "summary", "pass_band", "lengths"])
def test_what_is_missing_is_left_out(missing):
    empty = {"steps": {}, "summary": {}, "pass_band": None, "lengths": np.zeros(0, np.int32)}
    page = render_page(replace(RUN, **{missing: empty[missing]}))
    assert page.count("<svg") == {"steps": 4, "summary": 5, "pass_band": 6, "lengths": 6}[missing]


def test_one_step_and_one_problem_draw_too():
    steps = {name: values[:2] for name, values in STEPS.items()}
    assert "Throughput" in render_page(replace(RUN, steps=steps, pass_band=PassCurve((1,), (1.0,), (0.0,), (1.0,))))
