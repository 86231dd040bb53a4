"""The page of a run: everything in one file, and the figures that belong to what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape

import numpy as np
import pytest

from tokabatch.input.prompts.rebuild import RebuiltPrompt
from tokabatch.number_text import seconds_text
from tokabatch.output.excerpts import ErrorRow, ErrorRows, Excerpt
from tokabatch.output.steps import elapsed
from tokabatch.report.page import _cells, _columns, render_page
from tokabatch.report.plots import Band, Curve, histogram, over_time, with_bands
from tokabatch.report.run_record import PerToken, RunRecord
from tokabatch.report.step_figures import _rates, _thin
from tokabatch.scoring.estimates import Estimate

STEPS = {"replica": np.zeros(60)} | {
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
    name="<b>",
    model="a model",
    state="complete",
    samples=20,
    ok=18,
    errors=1,
    cancelled=0,
    lengths=np.arange(1, 19, dtype=np.int32),
    summary={"this_start": SUMMARY},
    steps=STEPS,
    estimates=(
        Estimate("mean score", 0.4, 0.3, 0.5),
        Estimate("pass@1", 0.4, 0.3, 0.5),
        Estimate("pass@2", 0.6, 0.5, 0.7),
        Estimate("pass@4", 0.75, 0.7, 0.8),
    ),
)


def test_a_page_stands_alone_and_escapes_what_it_is_given():
    page = render_page(RUN)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page and "<link" not in page and "src=" not in page
    assert "report</small>&lt;b&gt;</h1>" in page
    assert "by the roofline of &lt;this&gt;" in page and "last start" not in page


def test_a_page_says_what_it_is_and_what_its_figures_mean() -> None:
    page = render_page(replace(RUN, estimates=(*(RUN.estimates or ()), Estimate("best-of-4", 0.4, 0.3, 0.5))))
    assert "<title>tokabatch report: &lt;b&gt;</title>" in page and "<h1><small>tokabatch report</small>&lt;b&gt;<" in page
    assert (
        "pass@k: the chance that at least one of k samples of a problem (one row of the input) is right. best-of-k: the" in page
    )
    assert "In brackets: 95% intervals over the rows.</p>" in page and "maj@k" not in page
    assert "In brackets" not in render_page(replace(RUN, estimates=None))
    for alike in (Estimate("pass@4", 1.0, 0.6, 1.0), Estimate("pass@1", 0.0, 0.0, 0.4)):
        page = render_page(replace(RUN, estimates=(alike,)))
        assert (
            "the rows; where all rows are at 0% or 100%, they allow for rows unlike these (Clopper and Pearson, 1934)." in page
        )
    # Of one row, nothing follows for others; scores of any size may be 0 on average.
    for other in (Estimate("pass@1", 1.0, 0.0, 1.0), Estimate("mean score", 0.0, -0.1, 0.1)):
        assert "Clopper" not in render_page(replace(RUN, estimates=(other,)))
    started = replace(RUN, facts=[("started", "2026-01-02 03:04:05 UTC")])
    assert "<p class=sub>model a model, complete, started 2026-01-02 03:04:05 UTC</p>" in render_page(started)


def test_a_resumed_run_is_shown_over_all_its_starts():
    page = render_page(replace(RUN, summary={"this_start": {**SUMMARY, "earlier": 5}}))
    seconds, kept = STEPS["seconds"].sum(), RUN.lengths.sum()
    assert "of computing, all starts" in page and f"<b>{seconds_text(float(seconds))}</b>" in page
    # Not of the tokens sampled: those of samples that were unfinished at a stop are drawn twice.
    assert f"<b>{kept / seconds:,.0f}</b><span>output tokens a second of computing, all starts" in page
    assert "preemptions: samples set aside while the KV cache was full, last start" in page and "<b>40.0\u00a0s</b>" not in page
    assert f"<b>{int(RUN.lengths.sum()):,}</b><span>output tokens</span>" in page


@pytest.mark.parametrize("lacks", ["finished", "sampled"])
def test_without_the_steps_of_a_killed_start_times_and_rates_are_those_of_the_last_one(lacks: str) -> None:
    summary = {"this_start": {**SUMMARY, "earlier": 5}}
    page = render_page(replace(RUN, summary=summary, steps={**STEPS, lacks: np.full(60, 0.2)}))
    assert "all starts" not in page and "<span>time, of which loading 2.00\u00a0s, last start" in page
    assert "<b>132</b><span>output tokens a second after loading, last start" in page
    assert "without those of a start that was killed</small>" in page


def test_the_steps_of_several_processes_are_no_time_that_passed() -> None:
    page = render_page(replace(RUN, summary={"this_start": {**SUMMARY, "earlier": 5}}, shared=True))
    assert "all starts" not in page and "of several processes one after another</small>" in page


def test_the_rate_of_a_stopped_start_counts_unfinished_samples() -> None:
    stopped = replace(RUN, ok=9, summary={"this_start": {**SUMMARY, "kept_tokens": 3000}})
    assert "output tokens a second after loading, unfinished samples included<" in render_page(stopped)
    assert "unfinished" not in render_page(RUN)


def test_a_run_with_too_many_errors_says_so_at_the_top():
    page = render_page(replace(RUN, summary={"this_start": SUMMARY, "exit_code": 3}, errors=2))
    assert "a model, complete, but with 2 errors in 20 samples, more than errors.max_fraction allows</p>" in page


def test_a_run_without_a_verdict_says_so_at_the_top() -> None:
    silent = replace(RUN, without_verdict=RUN.ok, summary={"this_start": SUMMARY, "exit_code": 3})
    assert "a model, complete, but no sample has a verdict</p>" in render_page(silent)
    assert "verdict</p>" not in render_page(replace(silent, without_verdict=RUN.ok - 1))


def test_samples_that_were_cut_off_are_counted():
    tile = "<span>of the samples cut off at max_tokens"
    page = render_page(replace(RUN, cut_off=9))
    assert f"<b>50%</b>{tile}" in page, "whether it is bad depends on the task"
    assert tile not in render_page(RUN)


def test_errors_are_samples_and_their_rows_are_counted_where_these_are_fewer() -> None:
    rows = ErrorRows((ErrorRow(7, "7", 2, "bad_json", "why"),), {"bad_json": 4, "bad_type": 1})
    assert "<b class=bad>10</b><span>errors (5 rows)</span>" in render_page(replace(RUN, ok=8, errors=10, error_rows=rows))
    for page in (render_page(replace(RUN, ok=13, errors=5, error_rows=rows)), render_page(replace(RUN, errors=0))):
        assert "<span>errors</span>" in page


def test_a_phone_and_a_dark_screen_are_thought_of():
    page = render_page(RUN)
    assert (
        "flex:1 1 min(var(--least),100%)" in page and "prefers-color-scheme:dark" in page and "color-scheme:light dark" in page
    )
    assert "content='width=device-width'" in page and "@media(max-width:60rem){.tiles{grid-template-columns:repeat(3" in page
    # A key stands above its value on a phone.
    assert "@media(max-width:42rem){.keyed :is(tr,th,td){display:block" in page
    assert "<table class='keyed facts'><tr><th>device" in render_page(replace(RUN, facts=[("device", "CPU")]))


def test_a_figure_is_drawn_for_wide_and_for_narrow_columns_with_text_of_one_size():
    page = render_page(RUN)
    widths = {
        name: {float(width) for width in re.findall(rf'<svg class={name} .*? viewBox="0 0 ([0-9.]+) ', page)}
        for name in ("wide", "narrow")
    }
    assert widths == {"wide": {403.2}, "narrow": {266.4}} and "svg text{font-size" not in page
    wide, narrow = (
        set(re.findall(r'id="(\w{11})"', part)) for part in re.findall(r"<svg class=.*?</svg>", page, re.DOTALL)[:2]
    )
    assert wide and narrow and not wide & narrow


def test_the_last_line_of_tiles_has_the_fewest_gaps():
    assert [_columns(tiles) for tiles in (8, 9, 10, 11, 12, 13)] == [4, 5, 5, 4, 4, 5]


def test_samples_error_rows_and_what_the_run_was():
    right = Excerpt(3, 1, "text <i>", "stop", 12, True, {"question": "q & a", "none": None})
    wrong = replace(right, row_index=4, correct=False, text="x" * 9000)
    errors = ErrorRows((ErrorRow(7, "7", 2, "bad_json", "line 8: <why>"),), {"bad_json": 5})
    unjudged = replace(wrong, row_index=5, correct=None, unjudged="it <hung>", finish_reason="scored")
    shown = {"right": (right,), "wrong": (wrong, unjudged), "longest": (right,)}
    page = render_page(replace(RUN, facts=[("device", "a <GPU>")], error_rows=errors, samples_shown=shown))
    assert (
        page.count("<details>") == 4
        and "Prompt, " not in page
        and page.index("Right samples") < page.index("Wrong samples") < page.index("Longest")
    )
    assert "row 3, sample 1 <small>12 tokens</small><div>text &lt;i&gt;</div>" in page and "q &amp; a" in page
    assert "no verdict</b> <small>(it &lt;hung&gt;)</small> row 5" in page
    cut = replace(right, finish_reason="length", text=" a\n\nb" + " c" * 200)
    assert f"12 tokens, cut off</small><div>a b{' c' * 97}</div>" in render_page(replace(RUN, samples_shown={"first": (cut,)}))
    assert "x […]" in page and "x" * 4001 not in page
    assert "<td>bad_json<td>7<td>line 8: &lt;why&gt;" in page and "and 4 more of this code" in page
    assert "<th>device<td>a &lt;GPU&gt;" in page
    short, long = (render_page(replace(RUN, samples_shown=shown, prompts={3: RebuiltPrompt("<q>" * n)})) for n in (9, 900))
    assert short.count("<h3>Prompt, 27 characters</h3><pre>&lt;q&gt;") == 2 and short.count("<details>") == 4
    assert long.count("<details><summary>Prompt, 2,700 characters</summary><pre>") == 2
    plain = render_page(RUN)
    assert "<details>" not in plain and "<h2>" not in plain


def test_a_page_of_scored_texts_shows_choices_and_log_probabilities():
    text = Excerpt(3, 1, " Rome.", "scored", 4, False, {"options": [" Rome.", "Milan <"]}, logprob=-6.0)
    shown = {"right": (replace(text, correct=True),), "wrong": (text,), "lowest": (text,), "highest": (text,)}
    per_token = PerToken(np.array([-1.5, -0.5]), -1.0)
    accuracy = (Estimate("accuracy", 0.5, 0.4, 0.6), Estimate("normalized accuracy", 0.25, 0.2, 0.3))
    page = render_page(replace(RUN, samples_shown=shown, per_token=per_token, estimates=accuracy))
    assert "<b>50.0%</b><span>accuracy (40.0% to 60.0%)" in page and "normalized accuracy (20.0% to 30.0%)" in page
    assert "<b>-1.000</b><span>log-probability per token" in page and "<b>2.718</b><span>perplexity" in page
    assert "<b>22,026</b><span>perplexity" in render_page(replace(RUN, per_token=replace(per_token, mean=-10.0)))
    assert (
        page.index("Wrong choices")
        < page.index("Right choices")
        < page.index("Lowest log-prob")
        < page.index("Highest log-prob")
    )
    assert "row 3, text 1 <small>4 tokens, log-probability -6.00, -1.50 per token</small><div>Rome.</div>" in page
    assert "[&quot; Rome.&quot;, &quot;Milan &lt;&quot;]" in page and "Longest" not in page
    # No token is drawn: all that are computed are given.
    assert ">prompt and text tokens a second</text>" in page and ">output tokens</text>" not in page
    drawn = render_page(RUN)
    assert ">output tokens</text>" in drawn and ">prompt tokens</text>" in drawn
    assert "<figcaption>Log-probability per token<small>lowest -1.50, median -1.00, highest -0.50" in page


def test_every_figure_of_a_whole_run_is_there():
    page = render_page(RUN)
    titles = ("Throughput", "KV cache in use", "Samples running and waiting", "Output lengths", "pass@k", "Prompt tokens")
    for title in (*titles, "Predicted and actual"):
        assert f"<figcaption>{title}" in page
    assert page.count("<svg") == 2 * 5 and page.count("<div class=bars>") == 2
    assert "<span>computed</span><div><i style='width:18.7%;background:#9ec5fe'></i>210</div>" in page
    for fact in ("77.8%", "132", "pass@4 (70.0% to 80.0%)", "pass@1 (30.0% to 50.0%)", "pending", "<b>40.0\u00a0s</b>"):
        assert fact in page
    assert len(page) < 400_000


def test_what_only_the_last_start_says_is_named_so():
    page = render_page(RUN)
    assert "last start" not in page
    page = render_page(replace(RUN, summary={"this_start": {**SUMMARY, "earlier": 5}}))
    assert "the common part is computed once, last start</small>" in page
    assert "<small>time of all steps, last start; predicted by" in page


def test_a_stopped_run_shows_no_least_possible_of_prompts_that_have_not_begun() -> None:
    """It would be of the whole plan, less than nothing even."""
    assert RUN.pending and "least possible</span>" not in render_page(RUN)
    whole = replace(RUN, samples=19)
    assert "<span>least possible</span><div><i style='width:16.0%;background:#d1741f'></i>180</div>" in render_page(whole)
    for other in (replace(whole, shared=True), replace(RUN, cancelled=1)):
        assert not other.pending and "least possible</span>" not in render_page(other)


def test_predicted_and_actual_times_have_units_and_the_roofline_is_no_bound_that_was_beaten() -> None:
    page = render_page(RUN)
    assert "</i>30.0\u00a0s</div>" in page and "</i>38.0\u00a0s</div>" in page and "(the least possible)" in page
    faster = {"this_start": {**SUMMARY, "step_seconds": 20.0}}
    assert "(the least possible)" not in render_page(replace(RUN, summary=faster))


def test_the_length_of_a_folded_value_is_that_of_what_is_shown() -> None:
    """Of its JSON, in which a quotation mark has a backslash."""
    sample = Excerpt(0, 0, "a text", "stop", 3, None, {"marks": ['"'] * 200, "text": "x" * 800})
    page = render_page(replace(RUN, samples_shown={"first": (sample,)}))
    shown = json.dumps(['"'] * 200)
    assert (
        f"<summary>{len(shown):,} characters</summary>{escape(shown)}" in page
        and "<summary>800 characters</summary>xxx" in page
    )


def test_headings_of_samples_say_of_how_many_they_are() -> None:
    sample = Excerpt(0, 0, "a text", "stop", 3, True, {})
    run = replace(RUN, samples_shown={"right": (sample,), "wrong": (sample, sample), "longest": (sample,)}, right=7)
    page = render_page(run)
    for title, shown in (("Right", "1 of 7"), ("Wrong", "2 of 11")):
        assert f"<h2>{title} samples <small>{shown}</small></h2>" in page
    assert "<h2>Longest of the other samples, one of each row</h2>" in page
    # Those without a verdict count as wrong ones only under the heading that names them.
    without = replace(run, without_verdict=9)
    assert "<h2>Wrong samples <small>2 of 2</small></h2>" in render_page(without)
    both = replace(without, samples_shown={"wrong": (sample, replace(sample, correct=None, unjudged="it hung"))})
    assert "<h2>Wrong samples, and those without a verdict <small>2 of 11</small></h2>" in render_page(both)
    for unknown in (replace(run, unjudged=3), replace(run, right=None)):
        assert "<h2>Right samples</h2>" in render_page(unknown)


def test_a_page_of_one_sample_shows_no_curve_of_one_point_and_no_share_of_nothing() -> None:
    page = render_page(
        replace(RUN, samples=1, ok=1, errors=0, lengths=np.array([7], np.int32), estimates=(Estimate("pass@1", 1.0, 0.0, 1.0),),
                summary={"this_start": {**SUMMARY, "tail_seconds": 0.0}})
    )  # fmt: skip
    assert "<span>of 1 sample ok</span>" in page and "<figcaption>pass@k" not in page and "fewer than half" not in page


@pytest.mark.parametrize("lengths", [[5, 5, 8, 20], [5, 5, 8, 2000], [7]])
def test_bars_are_as_fine_as_a_few_lengths_are(lengths: list[int]) -> None:
    svg = histogram(np.array(lengths, np.int32), "tokens", "samples")
    span = max(lengths) - min(lengths) + 1
    # Twice, for wide and narrow columns.
    assert svg.count("opacity: 0.8") == 2 * (span if span <= 60 else -(-span // -(-span // 60)))


@pytest.mark.parametrize(("largest", "drawn"), [(200, "64 200"), (256, "64 128 256"), (48, "32 48")])
def test_labels_of_k_do_not_touch(largest: int, drawn: str) -> None:
    k = [1, 2, 4, 8, 16, 32, *(each for each in (64, 128) if each < largest), largest]
    labels = re.findall(r">(\d+)</text>", with_bands([Band("pass@k", k, *([0.1] * len(k) for _ in range(3)))], "k"))
    assert labels == ["1", "2", "4", "8", "16", *(() if largest == 48 else ["32"]), *drawn.split()] * 2


@pytest.mark.parametrize(("high", "ticks"), [(0.05, ["0%", "1%", "2%", "3%", "4%", "5%"]), (0.8, ["0%", "20%", "40%"])])
def test_the_axis_of_estimates_ends_above_their_band(high: float, ticks: list[str]) -> None:
    svg = with_bands([Band("pass@k", [1, 2], [0.02, 0.04], [0.01, 0.02], [0.03, high])], "k")
    assert re.findall(r">([\d.]+%)</text>", svg)[: len(ticks)] == ticks


def test_a_median_between_two_lengths_is_no_whole_number():
    page = render_page(replace(RUN, lengths=np.array([5, 5, 8, 20], np.int32)))
    assert "median 6.5, longest 20<" in page and ">mean 9.5</text>" in page
    assert "median 5, longest 8<" in render_page(replace(RUN, lengths=np.array([5, 5, 8], np.int32)))


def test_charts_over_time_begin_at_the_first_step():
    """Also where the first step took most of the time."""
    svg = over_time(np.array([4.5, 5.0]), [Curve("c", np.array([2.0, 1.0]))], "tokens").partition("</svg>")[0]
    line = re.search(r'<path d="([^"]*)" clip-path[^>]*fill: none', svg)
    assert line is not None
    points = dict.fromkeys(re.findall(r"[ML] ([0-9.]+) ([0-9.]+)", line[1]))
    (start, top), (corner, same), _, (end, low) = ((float(x), float(y)) for x, y in points)
    # The first value for nine tenths of the axis, then the second.
    assert top == same < low and (corner - start) / (end - start) == pytest.approx(0.9, abs=0.01)
    first_tick = re.search(r'<use [^>]*x="([0-9.]+)"', svg.partition("matplotlib.axis_1")[2])
    assert first_tick is not None and start == float(first_tick[1])


@pytest.mark.parametrize(
    ("figures", "short", "cells", "stacked", "in_a_row"),
    [(3, 0, 3, 0, 3), (3, 2, 3, 0, 3), (4, 0, 4, 0, 2), (4, 2, 3, 1, 3), (5, 2, 5, 0, 3), (6, 0, 6, 0, 3), (6, 2, 6, 0, 2),
     (7, 2, 6, 1, 3)],
)  # fmt: skip
def test_figures_fill_their_rows(figures: int, short: int, cells: int, stacked: int, in_a_row: int) -> None:
    """A short one is beside no high one, which would stretch it."""
    titles = [*(f"figure {place}" for place in range(figures - short)), *("Prompt tokens", "Predicted and actual")[:short]]
    found, least = _cells([(title, "", "") for title in titles])
    assert len(found) == cells and sum("class=stack" in each for each in found) == stacked
    assert "".join(found).count("<figure>") == figures and 77 // (float(least.removesuffix("rem")) + 1) == in_a_row


@pytest.mark.parametrize("value", [8, 64])
def test_axes_of_whole_numbers_have_no_fractions(value: int) -> None:
    svg = histogram(np.full(9, value, np.int32), "tokens", "samples")
    assert not re.findall(r">\d+\.\d+</text>", svg)


def test_axes_of_counts_have_round_numbers_written_as_elsewhere() -> None:
    svg = over_time(np.array([1.0, 2.0]), [Curve("c", np.array([768.0, 4700.0]))], "tokens").partition("</svg>")[0]
    assert re.findall(r">([\d,]+)</text>", svg.partition("matplotlib.axis_2")[2]) == [f"{n:,}" for n in range(0, 5000, 500)]
    svg = over_time(np.array([1.0, 2.0]), [Curve("c", np.array([700.0, 60.0]))], "tokens").partition("</svg>")[0]
    assert re.findall(r">([\d,]+)</text>", svg.partition("matplotlib.axis_2")[2]) == [f"{n}" for n in range(0, 800, 100)]


def test_the_longest_of_equal_samples_are_not_shown():
    """Nor those that were all cut off at one length: which of them are shown would be arbitrary."""
    one = Excerpt(0, 0, "text", "stop", 8, None, {})
    shown = replace(RUN, samples_shown={"first": [one], "longest": [one]})
    assert "Longest of the other samples" in render_page(shown)
    assert "Longest" not in render_page(replace(shown, lengths=np.full(9, 8, np.int32)))
    cut = [replace(one, row_index=row, finish_reason="length", num_output_tokens=18) for row in (0, 1)]
    assert "Longest" not in render_page(replace(shown, samples_shown={"first": [one], "longest": cut}))
    kept = [*cut, replace(one, row_index=2)]
    assert "Longest" in render_page(replace(shown, samples_shown={"first": [one], "longest": kept}))


def test_replicas_run_side_by_side():
    """Two of them, each as one alone: in the same time, at twice the rate, with twice as many samples running."""
    one = {"replica": np.zeros(40), "seconds": np.full(40, 0.5), "capacity": np.full(40, 9.0)}
    one |= {name: np.arange(40.0) for name in ("running", "waiting", "pages", "tokens", "sampled", "decoded", "finished")}
    two = {name: np.repeat(values, 2) for name, values in one.items()} | {"replica": np.tile([0.0, 1.0], 40)}
    assert elapsed(two).max() == elapsed(one).max() == 20.0
    names = ("running", "capacity")
    (edges, means), (expected, single) = _thin(two, names), _thin(one, names)
    assert np.allclose(edges, expected) and all(np.allclose(means[name], 2 * single[name]) for name in names)
    rates, alone = _rates(two, edges), _rates(one, edges)
    assert np.allclose(rates["sampled"], 2 * alone["sampled"])


@pytest.mark.parametrize("missing", ["steps", "summary", "estimates", "lengths"])
def test_what_is_missing_is_left_out(missing):
    empty = {"steps": {}, "summary": {}, "estimates": (), "lengths": np.zeros(0, np.int32)}
    page = render_page(replace(RUN, **{missing: empty[missing]}))
    assert page.count("<figure") == {"steps": 4, "summary": 5, "estimates": 6, "lengths": 6}[missing]


def test_one_step_and_one_problem_draw_too():
    steps = {name: values[:2] for name, values in STEPS.items()}
    both = tuple(Estimate(name, 1.0, 0.0, 1.0) for name in ("pass@1", "pass@4", "maj@4"))
    page = render_page(replace(RUN, steps=steps, estimates=both))
    assert "Throughput" in page and ">pass@k and maj@k<" in page


def test_a_part_of_a_run_gives_no_estimate():
    assert "no estimate" in render_page(replace(RUN, estimates=())) and "no estimate" not in render_page(
        replace(RUN, estimates=None)
    )
