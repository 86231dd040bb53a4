"""The end of a summary: samples, error rows, and commands to go on with."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from report.test_summary import SUMMARY
from support.scripted_run import scripted_run

from tokabatch.cli import folder
from tokabatch.errors import DamageError, OutputError
from tokabatch.output.excerpts import ErrorRow, ErrorRows, Excerpt, Kind
from tokabatch.report import closing
from tokabatch.report.review import _prompt_facts, write_report

OUT = Path("out/a b")
SAMPLE = Excerpt(0, 0, "a text", "stop", 3, None, {})


def show(monkeypatch: pytest.MonkeyPatch, found: dict[Kind, tuple[Excerpt, ...]]) -> dict[str, str]:
    monkeypatch.setattr(closing, "excerpts", lambda out, count: found)
    monkeypatch.setattr(closing, "finish_reasons", lambda out: Counter(stop=3, length=1))
    cut, section = closing.closing_sections(OUT, replace(SUMMARY, errors=0))
    assert cut.rows[0][1].startswith("1 sample (25.0%) ended at max_tokens") and section.title == "Samples"
    return {row[0]: row[1] for row in section.rows}


def test_right_and_wrong_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    right = [replace(SAMPLE, row_index=row, correct=True) for row in (0, 1, 2)]
    wrong = [replace(SAMPLE, row_index=row, correct=False) for row in (5, 6)]
    shown = show(monkeypatch, {"right": tuple(right), "wrong": tuple(wrong)})
    assert list(shown) == ["row 0, sample 0, right", "row 1, sample 0, right", "row 5, sample 0, wrong"]
    assert list(show(monkeypatch, {"wrong": (replace(SAMPLE, unjudged="it hung"),)})) == ["row 0, sample 0, no verdict"]
    assert list(show(monkeypatch, {"right": tuple(right)})) == [f"row {row}, sample 0, right" for row in (0, 1, 2)]


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        ({"kind": "regex", "answer": "answer", "options": {"pattern": "[^e]+"}}, r"extracted (?!nothing).+, expected 1,072"),
        ({"kind": "gsm8k", "answer": "answer"}, "extracted nothing, expected 1072"),
        ({"kind": "{}"}, r"length \d+"),
    ],
)
def test_what_a_judge_found_is_shown_beside_its_verdict(verify: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In the terminal below each sample, and in its line on the page."""
    rows, judge, out = tmp_path / "rows.jsonl", tmp_path / "long.py", tmp_path / "out"
    rows.write_text('{"question": "How many?", "answer": "1,072"}\n')
    judge.write_text("COLUMNS = {'length': int}\ndef verify(text, row): return {'score': False, 'length': len(text)}\n")
    summary = scripted_run(rows, out, verify={**verify, "kind": verify["kind"].format(judge)})
    section = next(each for each in closing.closing_sections(out, summary) if each.title == "Samples")
    (sample, judged) = section.rows
    assert sample[0].endswith(", wrong") and judged[0] == "judged" and re.fullmatch(said, judged[1]), section
    assert f"; {judged[1]}</small>" in write_report(out).read_text()


def test_scores_are_written_with_at_most_four_digits_or_as_whole_numbers() -> None:
    """Beside the verdict, in the terminal and on the page; very large and very small ones with an exponent."""
    scores = (12345.6, 9999.96, -2e6, 1234.5, 0.123456, 25.0, 1e30, 1.5e-9)
    assert closing.judged_text({f"s{place}": score for place, score in enumerate(scores)}) == (
        "s0 12,346, s1 10,000, s2 -2,000,000, s3 1,234, s4 0.1235, s5 25, s6 1e+30, s7 1.5e-09"
    )


def test_a_page_of_the_users_own_is_kept(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"question": "How many?"}\n')
    scripted_run(rows, out)
    page = write_report(out)
    assert write_report(out) == page
    page.write_text("<html>mine")
    with pytest.raises(OutputError, match=r"report\.html is not a page that this command wrote.*--to"):
        write_report(out)
    assert page.read_text() == "<html>mine"
    assert write_report(out, page) == page and page.read_text() != "<html>mine"


def test_a_page_is_named_after_its_folder_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"question": "How many?"}\n')
    scripted_run(rows, out)
    monkeypatch.chdir(out / "data")
    page = write_report(Path("..")).read_text()
    assert "<title>tokabatch report: out</title>" in page and f"<th>output<td>{out.resolve()}" in page


@pytest.mark.parametrize(
    ("prompt", "column"),
    [
        ({}, "messages"),
        ({"template": "{{ messages }}"}, ""),
        ({"token_ids": "ids"}, "ids"),
    ],
)
def test_the_column_of_prompts_is_named_also_by_default(prompt: dict[str, str], column: str) -> None:
    assert dict(_prompt_facts(prompt, "", {"id", "prompt_token_ids", "messages"}))["prompt from column"] == column


def test_an_unfolded_sample_shows_all_that_its_judge_says(tmp_path: Path) -> None:
    rows, judge, out = tmp_path / "rows.jsonl", tmp_path / "judge.py", tmp_path / "out"
    rows.write_text('{"question": "How many?", "notes": null, "long": "%s"}\n' % ("a" * 900))
    columns = "COLUMNS = {'extracted': str, 'reason': str, 'step': str}\n"
    judge.write_text(f"{columns}def verify(text, row): return {{'score': 0.25, 'reason': 'why ' * 30, 'step': None}}\n")
    scripted_run(rows, out, verify={"kind": str(judge)})
    page = write_report(out).read_text()
    assert "; extracted nothing, verify_score 0.25</small>" in page
    table = page[page.index("<h3>Judged</h3>") : page.index("<h3>Row</h3>")]
    assert "<th>verify_score<td>0.25" in table and f"<th>reason<td>{'why ' * 30}" in table
    assert "<th>step<td><small>null</small>" in table and "<th>notes<td><small>null</small>" in page
    assert f"<th>long<td><details><summary>900 characters</summary>{'a' * 900}</details>" in page


def test_a_notebook_shows_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "excerpts", lambda out, count: {"first": (replace(SAMPLE, text="a <b>\nc"),)})
    monkeypatch.setattr(closing, "finish_reasons", lambda out: Counter(stop=3))
    shown = replace(SUMMARY, errors=0)._repr_html_()
    assert "row 0, sample 0" in shown and "<td>a &lt;b&gt;<br>c</td>" in shown


def test_samples_that_nobody_judged_and_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("", "x" * 5000, "\n".join("abcdefghijklmnop"))
    found = tuple(replace(SAMPLE, row_index=row, text=text) for row, text in enumerate(texts))
    shown = list(show(monkeypatch, {"first": found}).values())
    assert shown[0] == "(no text)" and shown[1].endswith("x […]") and len(shown[1]) < 700
    assert shown[2].endswith("j […]")


def test_error_rows_and_how_many_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (ErrorRow(7, "id7", 4, "bad_json", "line 8: why\nand more"), ErrorRow(2, "2", 4, "empty_prompt", "no text"))
    section = closing.errors_section(ErrorRows(rows, {"bad_json": 9, "empty_prompt": 1}))
    assert section.rows == (
        ("bad_json", "7 (id7)", "line 8: why […]"), ("", "", "and 8 more of this code"), ("empty_prompt", "2", "no text"),
    )  # fmt: skip
    assert section.columns == ("code", "row (id)", "message")
    assert closing.errors_section(ErrorRows(rows[1:], {"empty_prompt": 1})).columns == ("code", "row", "message")
    section = closing.errors_section(ErrorRows(rows, {"bad_json": 9, "empty_prompt": 1}), "--all")
    assert section.rows[1][-1] == "and 8 more of this code; --all shows them"


def test_the_help_of_errors_says_how_many_rows_of_each_code_are_shown() -> None:
    option = get_type_hints(folder.errors, include_extras=True)["all_rows"].__metadata__[0]
    assert closing.PER_CODE == 3 and "first three rows of each code" in str(folder.errors.__doc__)
    assert "only the first three of each code" in option.help


def test_what_cannot_be_read_back_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise DamageError("a shard is gone")

    monkeypatch.setattr(closing, "excerpts", damaged)
    assert closing.closing_sections(OUT, SUMMARY) == ()


def test_next_steps_are_commands_to_paste() -> None:
    text = closing.next_steps(OUT, replace(SUMMARY, ok=300))
    assert "  the same command again  " in text and "computes the missing 90 samples" in text
    for command in (
        "tokabatch errors 'out/a b'",
        "tokabatch export 'out/a b' --to samples.jsonl",
        "tokabatch report 'out/a b'",
    ):
        assert f"\n  {command}  " in text
    short = closing.next_steps(Path("out/quickstart"), SUMMARY)
    assert "--retry-errors" in short and max(map(len, short.splitlines())) <= 80
    others = closing.next_steps(OUT, replace(SUMMARY, ok=300, exit_code=0))
    assert "the same command" not in others and "status" in others and "the progress of the other processes" in others
    assert "errors" not in closing.next_steps(OUT, replace(SUMMARY, errors=0))
    whole = closing.next_steps(OUT, SUMMARY)
    assert "the same command again" not in whole and "the same command with --retry-errors" in whole
    assert "--retry-errors" not in text
    unjudged = closing.next_steps(OUT, replace(SUMMARY, ok=400, errors=0, exit_code=0, unverified=400))
    assert "\n  tokabatch score 'out/a b'  " in unjudged
    assert "tokabatch score" in closing.next_steps(OUT, replace(SUMMARY, ok=400, errors=0, exit_code=0, unverified=1))
    assert "score" not in closing.next_steps(OUT, replace(SUMMARY, ok=400, errors=0, exit_code=0, unverified=0))
    stops = closing.next_steps(OUT, replace(SUMMARY, ok=400, errors=0, exit_code=3, unverified=400, stops_rows=True))
    assert "score" not in stops and "  the same command with --overwrite  " in stops
    stops = closing.next_steps(OUT, replace(SUMMARY, ok=400, errors=0, exit_code=0, unverified=1, stops_rows=True))
    assert "score" not in stops


def test_errors_that_the_input_causes_are_run_again_once_it_is_corrected() -> None:
    def advice(**counts: int) -> str:
        return closing.next_steps(OUT, replace(SUMMARY, error_counts=tuple(counts.items())))

    for text, corrected in ((advice(bad_json=1, missing_field=9), True), (advice(bad_json=1, nan_logits=1), False)):
        (line,) = (line for line in text.splitlines() if "--retry-errors" in line)
        assert line.endswith("  once the input is right" if corrected else "  runs them again")
    none_ok = closing.next_steps(OUT, replace(SUMMARY, ok=0, errors=400, error_counts=(("template_error", 400),)))
    assert "once the job is right: starts over" in none_ok and "once the job is right" not in advice(template_error=9)
