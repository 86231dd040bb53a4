"""The figures that are shown: that they are right, aligned, free of control codes, and safe with any text."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tokabatch.job import Setting
from tokabatch.number_text import counted, first_counted, seconds_text
from tokabatch.report.folder_state import check_sections, next_section, status_sections
from tokabatch.report.plan_report import HostFacts, ModelFacts, PlanReport, ReplicaFacts, plan_sections
from tokabatch.report.render import plain, tables
from tokabatch.report.sections import Section
from tokabatch.report.summary import RunSummary, run_sections, verdict_sections
from tokabatch.scoring.estimates import Estimate

SUMMARY = RunSummary(
    rows=100, samples=400, ok=390, errors=10, prompt_tokens=50_000, cached_tokens=30_000, cacheable_tokens=40_000,
    prefilled_tokens=20_500, output_tokens=80_000, seconds=45.0, load_seconds=5.0, steps=1234, output_path="out/x",
    exit_code=3, preemptions=2, recomputed_tokens=500, waited_steps=70, host_seconds=0.25,
    error_counts=(("prompt_too_long", 8), ("bad_json", 2)), verifies=True,
    estimates=(Estimate("mean score", 0.3, 0.2, 0.4), Estimate("pass@1", 0.25, 0.2, 0.3), Estimate("pass@4", 0.5, 0.4, 0.6)),
)  # fmt: skip
MODEL = ModelFacts("m", "llama", 3_400_000, 6, 256, 4, 2, 64, 2048, 4096, "float32")

REPLICA = ReplicaFacts(1536, 16, 1024, 512, 1536, 13_600_000, "float32", 8 << 20)


def a_plan(**changes: object) -> PlanReport:
    values: dict[str, object] = dict(
        model=MODEL, layout="1 replica: 1 visible GPU",
        replica=REPLICA, host=HostFacts(3 << 10, 5 << 20, 7 << 30), least_seconds=(90.0, "this CPU, by the roofline"),
        rows=100, samples=400,
        prompt_tokens=1000, unique_tokens=400,
        max_output_tokens=102_400, longest_prompt=77, first_prompt="Question: [bold]1+1[/bold]?\n  Answer:",
        first_token_ids=(1, 22, 333), settings=(Setting("n", "4", "job"), Setting("temperature", "0.6", "default")),
    )  # fmt: skip
    return PlanReport(**{**values, **changes})  # type: ignore[arg-type]


def facts(sections: tuple[Section, ...]) -> dict[str, str]:
    return {row[0]: row[1] for section in sections for row in section.rows}


class TestRunSummary:
    def test_figures(self) -> None:
        shown = facts(run_sections(SUMMARY, verbose=True))
        assert shown["samples"] == "400 = 390 ok + 10 errors"
        assert shown["output tokens"] == "80,000 (2,000 per second after loading)"
        assert shown["saved by sharing"] == "30,000 of 40,000 possible (75.0%)"
        # Of the whole plan.
        part = facts(run_sections(replace(SUMMARY, ok=300), verbose=True))
        assert part["saved by sharing"] == "30,000"
        assert shown["error prompt_too_long"] == "8 samples"
        assert shown["prompt tokens"] == "50,000, of which 60.0% were shared and not computed again"
        assert shown["preemptions"] == "2, 500 tokens recomputed; samples waited 70 steps for pages"
        assert shown["pass@4"] == "0.5000  (0.4000 to 0.6000)"
        assert "max_fraction" in shown["result"]

    def test_the_machine_s_own_terms_are_shown_on_demand(self) -> None:
        usual, all_of_it = run_sections(SUMMARY), run_sections(SUMMARY, verbose=True)
        assert not {"steps", "preemptions", "prefilled tokens", "KV cache"} & set(facts(usual))
        assert {"steps", "preemptions", "prefilled tokens"} <= set(facts(all_of_it))
        assert (
            facts(run_sections(replace(SUMMARY, step_seconds=40.0, tail_seconds=8.0)))["tail"]
            == "8.00 s (20%): fewer than half of the samples still running"
        )

    def test_figures_of_a_part_say_so(self) -> None:
        part = facts(run_sections(replace(SUMMARY, ok=40, estimates=())))
        assert part["no estimate"].startswith("50 of 400 samples so far; the first to finish may differ")
        assert "no estimate" not in facts(run_sections(SUMMARY))

    def test_no_row_at_all(self) -> None:
        assert facts(run_sections(replace(SUMMARY, ok=0, errors=400)))["result"].startswith("no row could be completed")

    def test_tokens_of_unfinished_samples_are_told_apart(self) -> None:
        shown = facts(run_sections(replace(SUMMARY, ok=200, kept_tokens=30_000)))["output tokens"]
        assert (
            shown == "80,000 (2,000 per second after loading), 30,000 of them in finished samples; the others are drawn again"
        )
        assert "drawn again" not in facts(run_sections(replace(SUMMARY, kept_tokens=79_000)))["output tokens"]

    def test_scores_between_wrong_and_right(self) -> None:
        assert facts(run_sections(SUMMARY))["right"].startswith("a score of verify.correct_from (1.0 by default) or more")
        alike = (Estimate("mean score", 0.25, 0.2, 0.3), Estimate("pass@1", 0.25, 0.2, 0.3))
        assert "right" not in facts(run_sections(replace(SUMMARY, estimates=alike)))

    def test_worrying_facts_come_first(self) -> None:
        assert "with 10 errors in 400 samples (2.5%), more than" in facts(run_sections(SUMMARY))["result"]
        silent = replace(SUMMARY, exit_code=3, unverified=390)
        assert "NO SAMPLE HAS A VERDICT" in facts(run_sections(silent))["result"]
        assert "`tokabatch score`" in facts(run_sections(silent))["result"]
        assert "--overwrite" in facts(run_sections(replace(silent, stops_rows=True)))["result"]
        assert facts(run_sections(replace(silent, exit_code=0, unverified=389)))["result"] == "complete"

    def test_the_work_of_a_start_that_continued_a_run_is_called_that(self) -> None:
        titles = [section.title for section in run_sections(replace(SUMMARY, earlier=300))]
        assert "Work of this start" in titles and "Work" not in titles

    def test_printed_by_a_script(self) -> None:
        assert str(SUMMARY).startswith("Run\n  result") and "\n  pass@1 " in str(SUMMARY)

    def test_in_a_notebook(self) -> None:
        shown = replace(SUMMARY, output_path="out/<x>")._repr_html_()
        assert "<b>Run</b><table><tr><td>result</td>" in shown and "out/&lt;x&gt;" in shown and "<x>" not in shown
        assert SUMMARY.pass_at_k == {1: 0.25, 4: 0.5}

    def test_a_run_without_verdicts_has_an_empty_mapping(self) -> None:
        unjudged = replace(SUMMARY, estimates=(), verifies=False)
        assert unjudged.pass_at_k == {} and unjudged.to_dict()["pass_at_k"] is None

    def test_what_is_left_is_shown_and_nothing_divides_by_zero(self) -> None:
        empty = RunSummary(
            rows=3, samples=12, ok=2, errors=0, prompt_tokens=0, cached_tokens=0, cacheable_tokens=0, prefilled_tokens=0,
            output_tokens=0, seconds=0.0, load_seconds=0.0, steps=0, output_path="o", exit_code=75, cancelled=4,
        )  # fmt: skip
        shown = facts(run_sections(empty))
        assert shown["samples"] == "12 = 2 ok + 0 errors + 4 cancelled + 6 pending"
        assert "committed" in shown["result"]
        assert "stopped before the end" in shown["result"]
        unmarked = facts(run_sections(replace(empty, ok=8)))
        assert unmarked["result"].startswith("every sample is committed, but the run is not marked as complete")
        assert "pass@1" not in shown and empty.this_start["output_tokens_per_second"] == 0

    def test_to_dict_is_json(self) -> None:
        values = json.loads(json.dumps(SUMMARY.to_dict()))
        assert values["pass_at_k"] == {"1": 0.25, "4": 0.5} and values["pending"] == 0
        assert values["error_counts"] == {"prompt_too_long": 8, "bad_json": 2}
        assert values["this_start"]["output_tokens"] == 80_000 and values["this_start"]["output_tokens_per_second"] == 2000
        assert not values["this_start"].keys() & values.keys() and "output_tokens" not in values


class TestPlan:
    def test_printed_by_a_script_and_in_a_notebook(self) -> None:
        report = a_plan()
        assert str(report) == plain(plan_sections(report)) and str(report).startswith("Model\n  path")
        shown = report._repr_html_()
        assert "<b>Work</b><table><tr><td>rows</td><td>100</td></tr>" in shown
        assert "[bold]1+1[/bold]?<br>  Answer:" in shown

    def test_figures(self) -> None:
        shown = facts(plan_sections(a_plan(error_counts=(("bad_json", 2), ("empty_prompt", 1)))))
        assert shown["rows"] == "100, 3 with errors" and shown["error bad_json"] == "2"
        strict = a_plan(error_counts=(("bad_json", 2), ("bad_row", 1)), error_samples=12, max_error_fraction=0.02)
        assert strict.has_too_many_errors
        too_many = "100, 3 with errors, more than errors.max_fraction (0.02) allows: the run would end with exit code 3"
        assert facts(plan_sections(strict))["rows"] == too_many
        assert shown["shared tokens"] == "600 (60.0%)"
        assert shown["parameters"] == "3,400,000" and shown["weights"] == "13 MiB in float32"
        assert shown["workspace"] == "8 MiB for the logits of a step, activations beside it"
        assert shown["KV cache"] == "24 MiB (1,024 pages, 16,384 tokens)"
        assert shown["tokenized input"].startswith("3 KiB on disk") and shown["finished samples"].startswith("at most 5 MiB")
        assert shown["output"].startswith("at most 7 GiB of disk")
        assert shown["time"].startswith("at least 1:30 (this CPU, by")

    def test_memory_of_a_gpu_is_measured_at_start_and_assumed_for_another(self) -> None:
        here = replace(REPLICA, measured_at_start=True)
        shown = facts(plan_sections(a_plan(replica=here, least_seconds=None)))
        assert shown["KV cache"].startswith("at most 24 MiB") and "measured when the model is loaded" in shown["workspace"]
        assert "not known for this device; --simulate --device predicts it" in shown["time"]
        assert "--simulate" not in facts(plan_sections(a_plan(least_seconds=None), simulated=True))["time"]
        assert "--simulate" not in facts(plan_sections(a_plan(), simulated=True))["time"]
        elsewhere = replace(REPLICA, working_bytes=4 << 30, weight_type="fp8, embeddings in bfloat16")
        shown = facts(plan_sections(a_plan(replica=elsewhere)))
        assert "4 GiB assumed for activations" in shown["workspace"] and shown["weights"].endswith(
            "in fp8, embeddings in bfloat16"
        )

    def test_settings_say_where_they_come_from(self) -> None:
        text = plain(plan_sections(a_plan()))
        assert "  key          value  from\n  n            4      job\n  temperature  0.6    default\n" in text

    def test_a_huge_prompt_is_cut_and_says_so(self) -> None:
        text = plain(plan_sections(a_plan(first_prompt="x" * 10_000, first_token_ids=tuple(range(5000)))))
        assert "[… and 6,000 more characters]" in text and "5,000 token ids" in text
        assert " 10 11 [… 4,976 more …] 4988 4989 " in text

    def test_where_every_row_is_bad_no_prompt_is_shown(self) -> None:
        titles = [section.title for section in plan_sections(a_plan(first_prompt="", first_token_ids=()))]
        assert "First prompt" not in titles and "Its 0 token ids" not in titles


class TestRender:
    def test_plain_text_has_no_control_codes_and_keeps_lines_apart(self) -> None:
        text = plain((*run_sections(SUMMARY), *plan_sections(a_plan())))
        assert "\x1b" not in text
        assert "  Question: [bold]1+1[/bold]?\n    Answer:" in text

    def test_columns_align(self) -> None:
        text = plain((Section("T", (("a", "1"), ("longer", "2\n3"))),))
        assert text == "T\n  a       1\n  longer  2\n          3"
        assert plain((Section("Empty", ()),)) == "Empty"

    def test_tables_show_markup_and_any_text_literally(self) -> None:
        stream = io.StringIO()
        sections = (*plan_sections(a_plan()), *run_sections(SUMMARY), Section("Empty", ()))
        Console(file=stream, force_terminal=True, width=100, color_system="truecolor").print(tables(sections))
        assert "[bold]1+1[/bold]" in stream.getvalue() and "prompt_too_long" in stream.getvalue()

    def test_status(self) -> None:
        sections = status_sections({"state": "running", "rows": None, "ok": 1200})
        assert plain(sections) == "Status\n  state  running\n  ok     1,200"

    def test_a_part_of_the_samples_gives_no_estimate(self) -> None:
        (partial,) = verdict_sections((), 57, 768)
        assert partial.rows == (("no estimate", "57 of 768 samples so far; the first to finish may differ from the rest"),)
        (whole,) = verdict_sections(SUMMARY.estimates, 768, 768)
        assert whole.rows[1] == ("pass@1", "0.2500  (0.2000 to 0.3000)")

    def test_status_of_a_running_job(self) -> None:
        pace = {"running_seconds": 70.0, "commit_seconds": 3.0, "samples_per_second": 12.0, "tokens_per_second": 1500.0}
        shown = facts(status_sections({}, {**pace, "seconds_left": 3700.0}))
        assert shown["running for"] == "1:10" and shown["last commit"] == "3.00 s ago"
        assert shown["speed"] == "samples per second 12, output tokens 1,500, since the first commit of this start"
        assert shown["time left"] == "about 1:01:40 at this speed"
        early = facts(status_sections({}, pace))
        assert early["time left"] == "known after three commits, as is the speed" and "speed" not in early

    def test_status_says_how_much_is_done(self) -> None:
        shown = facts(status_sections({"rows": 4, "samples": 8, "ok": 5, "errors": 1, "cancelled": 0, "pending": 2}))
        assert (shown["samples"], shown["ok"], shown["pending"]) == ("8, 75.0% done", "5", "2, still to be computed")
        assert "cancelled" not in shown
        assert facts(status_sections({"samples": 0, "pending": 0}))["samples"] == "0"

    def test_figures_have_the_same_names_in_status_and_check(self) -> None:
        shared = {"rows": 4, "samples": 8, "ok": 5, "errors": 1, "pending": 2, "bytes": 13}
        status, checked = facts(status_sections({"shards": 3, **shared})), facts(check_sections({"files": 3, **shared}, ()))
        assert {**status, "samples": "8"} == checked and checked["pending"] == "2, still to be computed"

    def test_status_explains_what_is_missing(self) -> None:
        none = {"correct": 0, "unjudged": 0, "without_verdict": 0, "of_another_judge": 0, "pending": 0}
        assert facts(status_sections(none)) == {"right": "0"}
        assert facts(status_sections({name: 3 for name in none})) == {
            "right": "3",
            "still to be judged": "3, computed without a verdict so far",
            "without a verdict": "3, as the judge could not judge them; they count as wrong",
            "judged earlier": "3 by another verifier, which does not count",
            "pending": "3, still to be computed",
        }

    @pytest.mark.parametrize(
        ("state", "counts", "commands"),
        [
            ("running", {"ok": 3, "pending": 5}, ["watch -n 10 tokabatch status 'out/a b'", "tokabatch report 'out/a b'"]),
            ("running", {"pending": 8}, ["watch -n 10 tokabatch status 'out/a b'"]),
            ("incomplete", {"pending": 8}, ["the same `tokabatch run` again"]),
            (
                "incomplete",
                {"ok": 3, "errors": 2, "pending": 3},
                ["the same `tokabatch run` again", "tokabatch errors 'out/a b'", "tokabatch report 'out/a b'"],
            ),
            ("incomplete", {"ok": 8, "of_another_judge": 3}, ["tokabatch score 'out/a b'", "tokabatch report 'out/a b'"]),
            (
                "complete",
                {"ok": 8},
                ["tokabatch export 'out/a b' --to samples.jsonl", "tokabatch report 'out/a b'"],
            ),
        ],
    )
    def test_status_says_what_to_do_next_in_every_state(self, state: str, counts: dict[str, int], commands: list[str]) -> None:
        values = {"state": state, "ok": 0, "errors": 0, "pending": 0, "unjudged": 0, "of_another_judge": None, **counts}
        (section,) = next_section(Path("out/a b"), values)
        assert [row[0] for row in section.rows] == commands


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0041, "4.1 ms"), (9.994, "9.99 s"), (59.9, "59.9 s"), (60, "1:00"), (3599.7, "1:00:00"), (90_061, "25:01:01")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_one_of_a_kind_has_no_plural():
    assert [counted(number, "row") for number in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert [counted(number, "row is", "rows are") for number in (1, 2)] == ["1 row is", "2 rows are"]
    assert [first_counted(number, "row") for number in (1, 20)] == ["first row", "first 20 rows"]
