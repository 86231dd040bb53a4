"""What a page says of each row: how often it is right, and its part of the prompt beside every sample."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from report.test_page import RUN

from tokabatch.input.prompts.rebuild import RebuiltPrompt
from tokabatch.output.excerpts import Excerpt
from tokabatch.report.page import render_page
from tokabatch.report.plots import Band, histogram_of_shares, with_bands
from tokabatch.report.run_record import HardRow
from tokabatch.scoring.row_counts import RowCounts

HARD = HardRow(3, "gsm-4", 0, 4, "<13>", 2, "12")
OF_ROWS = replace(
    RUN,
    row_counts=RowCounts(*(np.array(each) for each in ([0, 3, 5], [4, 4, 4], [4, 0, 1], [4, 4, 4], [4, 4, 4]))),
    hardest=[HARD, *(replace(HARD, row_index=10 + row, answer=None, answered=0) for row in range(11))],
    prompts={3: RebuiltPrompt("the whole prompt", "Two <and> two?")},
)


def test_rows_are_counted_by_their_right_samples_and_the_hardest_are_named() -> None:
    page = render_page(OF_ROWS)
    assert (
        "<figcaption>Right samples by row<small>of 3 rows, 1 without a right sample, 1 with all of them right</small>" in page
    )
    assert "<h2>Hardest rows <small>12 of the 3 rows, by their share of right samples</small></h2>" in page
    for cell in ("row (id)'>3 (gsm-4)", "right'>0 of 4", "most frequent answer'>&lt;13&gt; (2 of 4)", "expected'>12"):
        assert f"<td data-name='{cell}" in page
    assert "<td data-name='prompt'>Two &lt;and&gt; two?" in page and page.count("answer'>none found") == 11
    assert page.index("0 of 4") < page.index("<summary>2 more rows</summary>") and page.count("<table class=rows>") == 2
    for ok, causes in (([4, 0, 4], "1 error row"), ([4, 1, 4], "1 row without a verdict")):
        failed = replace(OF_ROWS.row_counts, ok=np.array(ok), judged=np.array([4, 0, 4]))
        assert f"1 without a right sample ({causes} among them), 1 with" in render_page(replace(OF_ROWS, row_counts=failed))


def test_of_stopped_rows_there_is_no_mean_share_which_is_biased() -> None:
    page = render_page(replace(OF_ROWS, cancelled=1))
    assert "1 without a right sample; rows that were stopped have fewer samples</small>" in page
    assert ">mean 41.7%<" in render_page(OF_ROWS) and ">mean 41.7%<" not in page


def test_a_long_id_is_cut() -> None:
    page = render_page(replace(OF_ROWS, hardest=[replace(HARD, id="x" * 41)]))
    assert f"row (id)'>3 ({'x' * 40} […])" in page


def test_columns_without_a_value_and_rows_of_one_sample_are_left_out() -> None:
    plain = replace(HARD, id=None, answer=None, answered=0, expected="")
    page = render_page(replace(OF_ROWS, hardest=[plain], prompts={}))
    assert "<tr><th>row<th>right<tr><td data-name='row'>3<td data-name='right'>0 of 4</table>" in page
    one = RowCounts(*(np.array(each) for each in ([0, 1], [1, 1], [1, 0], [1, 1], [1, 1])))
    for page in (render_page(replace(OF_ROWS, row_counts=one)), render_page(RUN)):
        assert "Right samples by row" not in page and "Hardest rows" not in page


@pytest.mark.parametrize(
    ("right", "samples", "bars"), [([0, 4, 4], [4, 4, 4], 5), ([0, 40, 7], [40, 40, 8], 20), ([0, 3, 4], [4, 3, 4], 20)]
)
def test_shares_have_a_bar_for_each_count_or_twenty(right: list[int], samples: list[int], bars: int) -> None:
    svg = histogram_of_shares(np.array(right), np.array(samples), "right", "rows")
    assert svg.count("opacity: 0.8") == 2 * bars and f">mean {np.mean(np.array(right) / np.array(samples)):.1%}</text>" in svg


@pytest.mark.parametrize(
    ("samples", "ticks"), [(2, "0% 50% 100%"), (3, "0% 33.3% 66.7% 100%"), (40, "0% 20% 40% 60% 80% 100%")]
)
@pytest.mark.parametrize("share", [0, 1])
def test_the_axis_of_shares_ends_at_them_and_bars_are_narrow(samples: int, ticks: str, share: int) -> None:
    """Also where all rows have the same share."""
    svg = histogram_of_shares(np.full(5, share * samples), np.full(5, samples), "right", "rows").partition("</svg>")[0]
    assert re.findall(r">(-?[\d.]+%)</text>", svg) == ticks.split()
    bar = re.search(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*opacity: 0.8', svg)
    assert bar is not None and float(bar[2]) - float(bar[1]) < 40


def test_an_estimate_of_one_k_has_its_interval() -> None:
    def lines(low: float) -> int:
        bands = [Band("pass@k", [1, 4], [0.2, 0.4], [0.1, 0.2], [0.3, 0.8]), Band("maj@k", [4], [0.3], [low], [0.5])]
        return len(set(re.findall(r'<path d="M [^"]*"[^>]*stroke: #d1741f[^>]*stroke-width: 3', with_bands(bands, "k"))))

    assert lines(0.2) == 2  # One in each of the drawings.


def test_each_sample_shows_the_rows_own_part_of_its_prompt() -> None:
    sample = Excerpt(3, 1, "C", "stop", 1, None, {})
    shown = replace(RUN, samples_shown={"first": (sample,)})
    page = render_page(replace(shown, prompts={3: RebuiltPrompt("<user>Which <planet>?\nA. Mars", "Which <planet>?\nA. Mars")}))
    assert "<div class=prompt>Prompt: Which &lt;planet&gt;? A. Mars</div><div>C</div>" in page
    assert "part of the prompt" not in page and "<h3>Prompt, 29 characters</h3>" in page
    # Behind long examples, which are folded, the row's own part is not.
    page = render_page(replace(shown, prompts={3: RebuiltPrompt("x" * 900 + "Which?", "Which?")}))
    assert "<h3>This row's part of the prompt, 6 characters</h3><pre>Which?</pre><details><summary>Prompt, 906" in page
    assert "class=prompt>" not in render_page(replace(shown, prompts={3: RebuiltPrompt("ids alone")}))


def test_words_of_the_machine_are_explained_where_they_stand() -> None:
    page = render_page(RUN)
    assert (
        "roofline of &lt;this&gt;, the time that the device&#x27;s arithmetic and memory bandwidth alone would take (the"
        in page
    )
    assert "60 steps (passes through the model) in" in page and "where prompts begin alike, the common part is computed" in page
    assert "memory for attention&#x27;s keys and values of the tokens so far, divided into 50 pages" in page


def test_an_answer_that_occurs_once_is_not_called_the_most_frequent() -> None:
    page = render_page(replace(OF_ROWS, hardest=[replace(HARD, answered=1)]))
    assert "most frequent answer'>all different<" in page
