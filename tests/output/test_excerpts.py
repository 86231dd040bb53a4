"""A few samples and the error rows of an output folder: which are chosen, and what is shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from support.shards import write_rows

from tokabatch.errors import DamageError
from tokabatch.input.fingerprint import Fingerprint
from tokabatch.output import excerpts as chosen
from tokabatch.output.claim import Claim
from tokabatch.output.excerpts import ErrorRow, Excerpt, Kind, error_rows, excerpts, finish_reasons, read_samples
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import Manifest, Versions, write_manifest
from tokabatch.output.schema import CORRECT, VERDICT_FIELDS, output_schema
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.report.review import write_report
from tokabatch.storage.listing import ListedFile

MANIFEST = Manifest("2026-01-02T03:04:05+00:00", "/", "m", Versions("1", "2", "3", "4"), 9, 18, {}, Fingerprint({}, {}))


def good(row: int, sample: int, tokens: int = 3, correct: bool | None = None) -> dict[str, Any]:
    known = dict(id=f"id{row}", row_index=row, sample_index=sample, status="ok", num_output_tokens=tokens, correct=correct)
    return {**known, "text": f"text {row}.{sample}", "finish_reason": "stop", "token_ids": [1], "question": f"question {row}"}


def bad(row: int, sample: int, code: str) -> dict[str, Any]:
    known = dict(id=f"id{row}", row_index=row, sample_index=sample, status="error", question=f"question {row}")
    return {**known, "error_code": code, "error_message": f"line {row + 1}: why"}


def folder(
    out: Path,
    *shards: list[dict[str, Any]],
    verified: bool = False,
    schema: pa.Schema | None = None,
    manifest: Manifest = MANIFEST,
) -> Path:
    verdicts = VERDICT_FIELDS if verified else ()
    schema = schema or output_schema(pa.schema([("question", pa.string())]), verdicts=verdicts)
    with Claim(out) as claim:
        write_manifest(claim, manifest, {})
        writer = ShardWriter(claim, schema, rows_per_shard=1000, flush_seconds=1e9)
        for rows in shards:
            write_rows(writer, pa.Table.from_pylist(rows, schema=schema))
            writer.commit()
    return out


def test_error_rows_by_code_in_the_order_of_the_input(tmp_path: Path) -> None:
    first = [bad(row, sample, "bad_json") for row in (7, 3) for sample in (0, 1)]
    second = [good(0, 0), bad(1, 0, "bad_json"), bad(2, 0, "empty_prompt"), bad(5, 1, "bad_json")]
    out = folder(tmp_path / "out", first, [good(8, 0)], second)
    found = error_rows(out)
    assert [(each.code, each.row_index, each.samples) for each in found.rows] == [
        ("bad_json", 1, 1), ("bad_json", 3, 2), ("bad_json", 5, 1), ("bad_json", 7, 2), ("empty_prompt", 2, 1),
    ]  # fmt: skip
    assert found.rows[0] == ErrorRow(1, "id1", 1, "bad_json", "line 2: why")
    few = error_rows(out, 2)
    assert [each.row_index for each in few.rows] == [1, 3, 2] and few.counts == {"bad_json": 4, "empty_prompt": 1}
    assert few.rows[1].samples == 2


def test_no_error_rows(tmp_path: Path) -> None:
    found = error_rows(folder(tmp_path / "out", [good(0, 0)]))
    assert (found.rows, found.counts) == ((), {})


def test_samples_where_nothing_is_verified_are_the_first_of_their_rows(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", [good(4, 1), good(4, 0), bad(0, 0, "bad_json"), good(2, 0)], [good(1, 0)])
    found = excerpts(out, 3)
    assert set(found) == {"first"}
    assert [(each.row_index, each.sample_index) for each in found["first"]] == [(2, 0), (4, 0)]
    assert finish_reasons(OutputFolder(out)) == {"stop": 4}
    assert found["first"][0].text == "text 2.0" and found["first"][0].columns == {"question": "question 2"}
    assert [each.row_index for each in excerpts(out, 2, whole=True)["first"]] == [1, 2]


def test_right_wrong_and_longest(tmp_path: Path) -> None:
    first = [good(0, 0, 5, True), good(0, 1, 9, False), good(1, 0, 7, False), good(2, 0, 7, None)]
    out = folder(tmp_path / "out", first, [good(3, 0, 8, True), good(3, 1, 20, True)], verified=True)
    found = excerpts(out, 2)
    assert [each.row_index for each in found["right"]] == [0] and found["right"][0].correct is True
    assert [(each.row_index, each.sample_index) for each in found["wrong"]] == [(0, 1), (1, 0)]
    longest = excerpts(out, 2, whole=True)["longest"]
    # Not the wrong samples of rows 0 and 1 again.
    assert [(each.row_index, each.num_output_tokens) for each in longest] == [(3, 20), (2, 7)]
    assert CORRECT.name not in longest[0].columns


def test_the_longest_are_those_of_all_samples_that_are_not_shown_already(tmp_path: Path) -> None:
    first = [good(0, 0, 5, True), good(0, 1, 90, False), good(0, 2, 80, False), good(1, 0, 3, False), good(1, 1, 4, False)]
    out = folder(tmp_path / "out", first, [good(0, 3, 70, False), good(0, 4, 60, True)], verified=True)
    found = excerpts(out, 2, whole=True)
    named = {kind: [(each.row_index, each.num_output_tokens) for each in of_kind] for kind, of_kind in found.items()}
    # Each from another row, in whatever shard its samples are.
    assert named == {"right": [(0, 5)], "wrong": [(0, 90), (1, 3)], "longest": [(0, 80), (1, 4)]}


@pytest.mark.parametrize("seed", range(12))
def test_the_longest_however_samples_are_spread_over_rows_and_shards(seed: int, tmp_path: Path) -> None:
    rng = Random(seed)
    rows = [good(row, n, rng.randint(1, 99), rng.random() < 0.5) for row in range(4) for n in range(rng.randint(1, 30))]
    rng.shuffle(rows)
    out = folder(tmp_path / "out", *(rows[at : at + 9] for at in range(0, len(rows), 9)), verified=True)
    found = excerpts(out, 2, whole=True)
    shown = {(each.row_index, each.sample_index) for each in (*found.get("right", ()), *found.get("wrong", ()))}
    others = [each for each in rows if (each["row_index"], each["sample_index"]) not in shown]
    tokens = {row: max(each["num_output_tokens"] for each in others if each["row_index"] == row)
              for row in {each["row_index"] for each in others}}  # fmt: skip
    expected = sorted(tokens.items(), key=lambda each: (-each[1], each[0]))[:2]
    assert [(each.row_index, each.num_output_tokens) for each in found["longest"]] == expected


def scored(row: int, sample: int, logprob: float, tokens: int, correct: bool | None = None) -> dict[str, Any]:
    return {**good(row, sample, tokens, correct), "cumulative_logprob": logprob, "finish_reason": "scored"}


def test_scored_rows_are_right_or_wrong_by_their_likeliest_text(tmp_path: Path) -> None:
    def named(found: Mapping[Kind, Sequence[Excerpt]]) -> dict[Kind, list[tuple[int, int, float | None]]]:
        return {kind: [(each.row_index, each.sample_index, each.logprob) for each in shown] for kind, shown in found.items()}

    schema = output_schema(pa.schema([("question", pa.string())]), verdicts=VERDICT_FIELDS, scored=True)
    # Row 1 has a text in each shard; its likeliest one is wrong, and the shortest.
    first = [scored(0, 0, -9.0, 3, False), scored(0, 1, -2.0, 1, True), scored(1, 0, -5.0, 10, True)]
    out = folder(tmp_path / "out", first, [scored(1, 1, -4.0, 1, False)], schema=schema)
    texts = {"right": [(0, 1, -2.0)], "wrong": [(1, 1, -4.0)], "lowest": [(0, 0, -9.0)], "highest": [(1, 0, -5.0)]}
    assert named(excerpts(out, 1, whole=True)) == texts
    # Of the other texts, also where a row's lowest or highest of all is shown as right or wrong.
    del texts["highest"]
    assert named(excerpts(out, 2, whole=True)) == {**texts, "lowest": [(0, 0, -9.0), (1, 0, -5.0)]}
    assert set(excerpts(out, 2)) == {"right"}  # Of the first shard alone.
    unjudged = output_schema(pa.schema([("question", pa.string())]), scored=True)
    plain = excerpts(folder(tmp_path / "plain", first, schema=unjudged), 2)
    assert [(each.row_index, each.sample_index) for each in plain["first"]] == [(0, 0), (1, 0)]


def test_the_page_of_scored_texts_that_nothing_judges_shows_texts_of_all_rows(tmp_path: Path) -> None:
    schema = output_schema(pa.schema([("question", pa.string())]), scored=True)
    manifest = replace(MANIFEST, job={"mode": "score"})
    out = folder(tmp_path / "out", [scored(row, 0, -1.0 - row, 2) for row in range(3)], schema=schema, manifest=manifest)
    page = write_report(out).read_text()
    assert all(f"<pre>text {row}.0</pre>" in page for row in range(3))
    # There are no other texts above them.
    assert page.count("<h2>Lowest log-probability per token, one text of each row</h2>") == 1 and "other texts" not in page


def test_columns_have_the_names_of_the_input(tmp_path: Path) -> None:
    schema = output_schema(pa.schema([("text", pa.string())]))
    out = folder(tmp_path / "out", [{**good(0, 0), "input_text": "own"}], schema=schema)
    assert excerpts(out, 1)["first"][0].columns == {"text": "own"}


def test_a_damaged_shard_is_reported(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", [bad(0, 0, "bad_json")])
    path = next((out / "data").iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamageError, match="part-00000"):
        error_rows(out)


def test_a_few_examples_open_the_shards_that_they_come_from_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder(tmp_path / "out", *([good(row, 0, correct=True)] for row in range(9)), verified=True)
    opened: list[str] = []
    open_shard = chosen.open_shard

    def noting(shard: ListedFile) -> Any:
        opened.append(shard.path.name)
        return open_shard(shard)

    monkeypatch.setattr(chosen, "open_shard", noting)
    assert [each.row_index for each in excerpts(out, 3)["right"]] == [0] and len(set(opened)) == 1
    assert len(excerpts(out, 5, whole=True)["right"]) == 5 and len(set(opened)) == 9


def test_samples_are_read_by_their_places_over_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokabatch.output.shards._ROW_GROUP_BYTES", 1)
    out = folder(tmp_path / "out", [good(4, 0), good(1, 0)], [good(2, 0), bad(3, 0, "bad_json"), good(0, 0)])
    shards = OutputFolder(out).shards()
    found = read_samples(shards, [4, 1, 2, 0, 1])
    assert [(each.row_index, each.id, each.text, each.columns) for each in found] == [
        (row, f"id{row}", "", {"question": f"question {row}"}) for row in (0, 1, 2, 4, 1)
    ]
    assert read_samples(shards, []) == []
