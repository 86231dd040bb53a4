"""Texts split at the end of a model's reasoning: what is reported, what is judged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_job, scripted_run

from tokabatch import plan
from tokabatch.errors import JobError
from tokabatch.output.export import nest
from tokabatch.output.reasoning import ReasoningTags, choose_tags, split_reasoning
from tokabatch.runner.sample_tables import SampleTables
from tokabatch.runner.score import score

TAGS = ReasoningTags("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "answer"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.", False, "Two and two.", "Four."),
        ("Two and two.</think>Four.", True, "Two and two.", "Four."),
        ("Two and two.</think>Four.", False, "Two and two.", "Four."),
        ("<think>Two and", False, "Two and", None),
        ("Two and", True, "Two and", None),
        ("Four.", False, None, "Four."),
        ("<think></think>", False, "", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
    ],
)
def test_split(text: str, begun: bool, reasoning: str | None, answer: str | None) -> None:
    assert split_reasoning(text, TAGS, begun=begun) == (reasoning, answer)


def test_the_tags_of_a_model() -> None:
    nothing = dict(templates=[], is_token=lambda text: False, special=())
    assert choose_tags("auto", **{**nothing, "templates": ["{% if x %}</think>{% endif %}"]}) == TAGS
    assert choose_tags("auto", **{**nothing, "is_token": lambda text: text == "[/THINK]"}).begin == "[THINK]"
    assert choose_tags(("<a>", "</a>"), **nothing) == ReasoningTags("<a>", "</a>")
    with pytest.raises(JobError, match=r"has none of </think>.*write the model's own tags"):
        choose_tags("auto", **nothing)
    with pytest.raises(JobError, match=r"</think> is a special token"):
        choose_tags(("<think>", "</think>"), **{**nothing, "special": {"</think>"}})


def test_a_run_judges_the_answer_and_export_keeps_it_with_the_sample(tmp_path: Path) -> None:
    rows, out, judge = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "judge.py"
    rows.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(4)) + "{broken\n")
    judge.write_text("COLUMNS = {'seen': str}\ndef verify(text, row): return {'score': text == 'Four.', 'seen': text}\n")
    said = ["<think>2 + 2</think> Four.", "<think>2 +", "Five.", "<think>x</think>Four."]

    def texts(self: SampleTables, completions: list) -> list[str]:
        return [said[completion.row_index] for completion in completions]

    with mock.patch.object(SampleTables, "texts", texts):
        scripted_run(rows, out, verify={"kind": str(judge)}, output={"split_reasoning": ["<think>", "</think>"]})

    def check() -> None:
        table = pq.read_table(sorted((out / "data").iterdir())[0]).sort_by([("row_index", "ascending")])
        found = [sample for sample in table.to_pylist() if sample["sample_index"] == 0]
        assert [sample["text"] for sample in found] == [*said, None]
        assert [sample["reasoning_text"] for sample in found] == ["2 + 2", "2 +", None, "x", None]
        assert [sample["answer_text"] for sample in found] == ["Four.", None, "Five.", "Four.", None]
        assert [sample["seen"] for sample in found] == ["Four.", "", "Five.", "Four.", None]
        assert [sample["correct"] for sample in found] == [True, False, False, True, None]
        assert "answer_text" in nest(table).schema.field("samples").type.value_type.names

    check()
    judge.write_text(judge.read_text() + "# edited\n")
    assert score(out).judged == 8
    check()


def test_a_tokenizer_without_tags_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(JobError, match="the tokenizer has none of"):
        plan(scripted_job(tmp_path / "rows.jsonl", tmp_path / "out", output={"split_reasoning": "auto"}))
