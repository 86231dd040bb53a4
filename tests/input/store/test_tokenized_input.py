"""Ingestion: books that close, ids, column types, and the refusals of an input as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokabatch.errors import InputError
from tokabatch.input.prompts.few_shot import render_few_shot
from tokabatch.input.store.tokenized_input import InputStore
from tokabatch.job import Job

ROOT = Path(__file__).parents[3]
Write = Callable[..., Path]
Ingest = Callable[..., InputStore]


def everything(store: InputStore) -> list[dict[str, Any]]:
    return store.columns(np.arange(store.num_rows)).to_pylist()


def test_bad_rows_among_good_ones_change_no_other_row(write_rows: Write, ingest_job: Ingest) -> None:
    good = [{"prompt": f"row {number}", "n": number} for number in range(10_000)]
    bad: list[Any] = [b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', {"n": 1}, {"prompt": None}, {"prompt": ""}, b"[]"]
    mixed: list[Any] = list(good)
    for number, line in enumerate(bad):
        mixed.insert(1000 * number + 1, line)
    alone = ingest_job(write_rows(*good))
    store = ingest_job(write_rows(*mixed, name="mixed.jsonl"))
    assert store.num_rows == 10_007
    assert sorted(error.code for error in store.errors.values()) == sorted(
        ["bad_json", "bad_utf8", "bad_unicode", "missing_field", "missing_field", "empty_prompt", "bad_json"]
    )
    rows = [row for row in range(store.num_rows) if row not in store.errors]
    assert np.array_equal(store.tokens, alone.tokens)
    assert np.array_equal(store.length[rows], alone.length)
    assert store.columns(np.asarray(rows)).to_pylist() == good
    assert not store.length[list(store.errors)].any()


def test_any_rows_in_any_order(write_rows: Write, ingest_job: Ingest) -> None:
    store = ingest_job(write_rows(*({"prompt": "x", "n": number} for number in range(3000))))
    rows = np.random.default_rng(1).integers(0, 3000, 20_000)
    assert store.columns(rows).column("n").to_numpy().tolist() == rows.tolist()
    assert store.columns(rows[:0]).num_rows == 0
    assert store.ids(rows[:3]).to_pylist() == [str(row) for row in rows[:3]]
    assert store.columns(np.asarray([2, 2]), ["n"]).to_pylist() == [{"n": 2}, {"n": 2}]


def test_column_types_are_learned_over_the_whole_file(tmp_path: Path, write_rows: Write, ingest_job: Ingest) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "i": 1, "f": 1, "mixed": 1, "deep": {"x": 1, "y": None}, "l": [], "big": 2**70, "e": {}, "z": None},
        {"prompt": "b", "f": 2.5, "mixed": "one", "deep": {"x": 2.5, "w": [True]}, "l": [{"k": 1}], "big": 1, "e": {}},
        {"prompt": "c", "late": "only here", "mixed": {"k": [1]}, "l": [{"k": "a"}], "wide": 2**60},
        {"prompt": "d", "wide": 0.5},
    ]
    store = ingest_job(write_rows(*rows))
    types = {field.name: field.type for field in store.column_schema}
    assert (types["i"], types["f"], types["mixed"], types["big"]) == (pa.int64(), pa.float64(), pa.string(), pa.string())
    assert types["deep"] == pa.struct({"x": pa.float64(), "y": pa.string(), "w": pa.list_(pa.bool_())})
    assert (types["e"], types["z"], types["wide"], types["late"]) == (pa.string(),) * 4
    table = store.columns(np.arange(4))
    shown = table.to_pylist()
    assert [row["mixed"] for row in shown] == ["1", '"one"', '{"k": [1]}', None]
    assert [row["l"] for row in shown] == [[], [{"k": "1"}], [{"k": '"a"'}], None]
    assert json.loads(shown[0]["big"]) == 2**70 and shown[2]["wide"] == str(2**60)
    assert shown[1]["deep"] == {"x": 2.5, "y": None, "w": [True]}
    pq.write_table(table, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(table)


def test_output_columns_are_chosen_and_the_answer_stays_at_hand(write_rows: Write, ingest_job: Ingest) -> None:
    path = write_rows({"prompt": "x", "a": 1, "b": 2, "c": 3})
    store = ingest_job(path, output={"path": "out", "columns": ["b"]}, verify={"kind": "exact", "answer": "c"})
    assert everything(store) == [{"b": 2}]
    assert store.columns(np.asarray([0]), ["c"]).to_pylist() == [{"c": 3}]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_ids(format: str, tmp_path: Path, write_rows: Write, ingest_job: Ingest) -> None:
    rows = [{"prompt": "x", "key": key} for key in (7, 8, None, 9)]
    path = write_rows(*rows)
    if format == "parquet":
        path = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    store = ingest_job(path, input={"id_column": "key"})
    assert store.ids(np.asarray([3, 2, 0, 1])).to_pylist() == ["9", None, "7", "8"]
    assert {row: error.code for row, error in store.errors.items()} == {2: "missing_field"}


def test_uuids_and_whole_decimals_are_ids(tmp_path: Path, ingest_job: Ingest) -> None:
    numbers = [UUID(int=number) for number in (7, 8)]
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([number.bytes for number in numbers], pa.binary(16)))
    decimals = pa.array([Decimal("10") ** 30, Decimal("1.50")], pa.decimal128(38, 2))
    pq.write_table(pa.table({"prompt": ["x", "x"], "uuid": uuids, "decimal": decimals}), tmp_path / "rows.parquet")
    store = ingest_job(tmp_path / "rows.parquet", input={"id_column": "uuid"})
    assert store.ids(np.arange(2)).to_pylist() == [str(number) for number in numbers]
    store = ingest_job(tmp_path / "rows.parquet", input={"id_column": "decimal"})
    assert store.ids(np.arange(2)).to_pylist() == ["1" + "0" * 30, None] and store.errors[1].code == "bad_type"


def test_whole_floats_are_ids_as_pandas_writes_them_beside_a_missing_one(tmp_path: Path, ingest_job: Ingest) -> None:
    ids = pa.array([7.0, -8.0, float("nan"), None, 2.0**53], pa.float64())
    pq.write_table(pa.table({"prompt": ["x"] * 5, "key": ids}), tmp_path / "rows.parquet")
    store = ingest_job(tmp_path / "rows.parquet", input={"id_column": "key"})
    assert store.ids(np.arange(5)).to_pylist() == ["7", "-8", None, None, None]
    assert {row: error.code for row, error in store.errors.items()} == {2: "missing_field", 3: "missing_field", 4: "bad_type"}
    for row in (2, 3):
        assert "remove input.id_column to number the rows" in store.errors[row].message
    assert "is the floating-point number 9007199254740992.0, which is not exact from 2^53 on" in store.errors[4].message


def test_floats_of_32_bits_are_ids_with_a_note_where_they_may_be_rounded(tmp_path: Path, ingest_job: Ingest) -> None:
    ids = pa.array([2.0**24 - 1, 2.0**24 + 2, None, 2.0**60], pa.float32())
    pq.write_table(pa.table({"prompt": ["x"] * 4, "key": ids}), tmp_path / "rows.parquet")
    store = ingest_job(tmp_path / "rows.parquet", input={"id_column": "key"})
    assert store.ids(np.arange(4)).to_pylist() == ["16777215", "16777218", None, None] and store.errors.keys() == {2, 3}
    assert any(
        "rounded from 2^24 on, the first in row 1; if ids were integers before, give those" in note for note in store.notes
    )


def test_an_index_that_pandas_gave_no_name_is_a_column_like_any_other(tmp_path: Path, ingest_job: Ingest) -> None:
    frame = pandas.DataFrame({"prompt": ["a", "b", "c", "d"], "n": [1, 2, 3, 4]})
    frame[frame.n != 2].to_parquet(tmp_path / "rows.parquet")
    store = ingest_job(tmp_path / "rows.parquet", input={"id_column": "__index_level_0__"})
    assert store.column_schema.names == ["prompt", "n", "__index_level_0__"]
    assert store.ids(np.arange(3)).to_pylist() == ["0", "2", "3"]


def test_ids_of_other_types_are_faults(write_rows: Write, ingest_job: Ingest) -> None:
    store = ingest_job(write_rows(*({"prompt": "x", "key": key} for key in (1.5, True, [1], "a"))), input={"id_column": "key"})
    assert [store.errors[row].code for row in range(3)] == ["bad_type"] * 3


def test_duplicate_ids_are_refused_with_the_first_ten(write_rows: Write, ingest_job: Ingest) -> None:
    path = write_rows(*({"prompt": "x", "key": f"k{number % 3000}"} for number in range(3015)), {"prompt": "x", "key": "k2"})
    with pytest.raises(InputError) as caught:
        ingest_job(path, input={"id_column": "key"})
    message = str(caught.value)
    for row in (0, 2, 9):
        assert f"'k{row}' ({path} line {row + 1} and {path} line {row + 3001})" in message
    assert "k10" not in message and message.count(" line ") == 20


def test_messages_name_file_and_line(
    write_rows: Write, ingest_job: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows({"prompt": "a"}, {"prompt": "b"}, name="rows/a.jsonl")
    (folder / "b.jsonl").write_text('\n{"prompt": 1}\n{"prompt": "c"}\n')
    (folder / "c.jsonl").write_text('{"prompt": ""}\n')
    monkeypatch.chdir(folder.parent)
    store = ingest_job(folder)
    told = {row: error.message.partition(":")[0] for row, error in store.errors.items()}
    assert told == {2: "rows/b.jsonl line 2", 4: "rows/c.jsonl line 1"}
    assert [store.places.name(row) for row in (1, 3)] == ["row 1 (rows/a.jsonl line 2)", "row 3 (rows/b.jsonl line 3)"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(content: bytes, tmp_path: Path, ingest_job: Ingest) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="holds no rows"):
        ingest_job(tmp_path / "x.jsonl")


def test_a_file_of_nothing_but_bad_rows_still_has_its_books(write_rows: Write, ingest_job: Ingest) -> None:
    store = ingest_job(write_rows(b"{", b"["), prompt={"template": "{{ q }}"})
    assert (store.num_rows, len(store.errors), store.first_prompt_row) == (2, 2, None)
    assert store.column_schema.names == []


def test_named_columns_of_nothing_but_bad_rows_are_null(write_rows: Write, ingest_job: Ingest) -> None:
    path = write_rows(b"{", b"[")
    store = ingest_job(path, verify={"kind": "exact", "answer": "a"})
    rows = np.asarray([1, 0, 1])
    assert store.columns(rows, ["a"]).to_pylist() == [{"a": None}] * 3
    assert store.columns(rows, []).num_columns == store.columns(rows).num_columns == 0
    store = ingest_job(path, output={"path": "out", "columns": ["b"]}, verify={"kind": "exact", "answer": "a"})
    assert store.column_schema == pa.schema({"b": pa.string()}) and store.columns(rows).to_pylist() == [{"b": None}] * 3


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_an_output_without_input_columns(format: str, tmp_path: Path, write_rows: Write, ingest_job: Ingest) -> None:
    rows = [{"prompt": "x", "a": number} for number in range(1500)]
    path = write_rows(*rows)
    if format == "parquet":
        path = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    asked = np.asarray([3, 3, 1200, 0])
    for sections in ({}, {"verify": {"kind": "exact", "answer": "a"}}):
        store = ingest_job(path, output={"path": "out", "columns": []}, **sections)
        assert store.column_schema.names == [] and store.columns(asked).num_columns == 0
        assert store.ids(asked).to_pylist() == ["3", "3", "1200", "0"]
    assert store.columns(asked, ["a"]).to_pylist() == [{"a": 3}, {"a": 3}, {"a": 1200}, {"a": 0}]


def test_messages_of_bad_rows_are_kept_short(write_rows: Write, ingest_job: Ingest) -> None:
    store = ingest_job(write_rows({"prompt": "x", "sampling_params": {"y" * 5000: 1}}, {"prompt": "x"}))
    assert len(store.errors[0].message) == 500 and store.errors[0].message.endswith("…")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"input": {"id_column": "nosuch"}}, r"input\.id_column.*'nosuch'.*a, prompt"),
        ({"verify": {"kind": "exact", "answer": "nosuch"}}, r"verify\.answer.*'nosuch'"),
        ({"output": {"path": "out", "columns": ["a", "nosuch"]}}, r"output\.columns.*'nosuch'"),
    ],
)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_columns_that_the_job_names_must_exist(
    sections: dict[str, Any], message: str, format: str, tmp_path: Path, write_rows: Write, ingest_job: Ingest
) -> None:
    path = write_rows({"prompt": "x", "a": 1})
    if format == "parquet":
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"prompt": ["x"], "a": [1]}), path)
    with pytest.raises(InputError, match=message):
        ingest_job(path, **sections)


def test_limit_takes_the_first_rows(tmp_path: Path, write_rows: Write, ingest_job: Ingest) -> None:
    path = write_rows(*({"prompt": f"p{number}"} for number in range(3000)))
    store = ingest_job(path, input={"limit": 1500})
    assert (store.num_rows, len(store.length), store.columns(np.asarray([1499])).num_rows) == (1500, 1500, 1)
    pq.write_table(pa.table({"prompt": ["x"] * 3000}), tmp_path / "x.parquet")
    store = ingest_job(tmp_path / "x.parquet", input={"limit": 1025})
    assert (store.num_rows, store.columns(np.asarray([1024])).num_rows) == (1025, 1)


def test_the_gsm8k_job_loads_and_its_shots_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = Job.load("jobs/gsm8k.yaml", "input.path=test.jsonl", "input.limit=5")
    assert job.prompt.few_shot is not None and job.generation.n == 100
    few_shot = job.prompt.few_shot
    header = render_few_shot(few_shot.path, few_shot.k, few_shot.template)
    assert header.count("Question: ") == job.prompt.few_shot.k and header.endswith("\n\n")
    for line in Path(job.prompt.few_shot.path).read_text().splitlines():
        answer = json.loads(line)["answer"]
        sums = re.findall(r"<<([-+*/.0-9]+)=([0-9.]+)>>", answer)
        assert sums and answer.count("<<") == len(sums)
        assert all(eval(left) == float(right) for left, right in sums)
        assert answer.rsplit("#### ", 1)[1] == sums[-1][1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(write_rows: Write, ingest_job: Ingest) -> None:
    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) << 10

    ingest_job(write_rows(*({"prompt": f"row {number}"} for number in range(5_000))))
    path = write_rows(*({"id": f"r{number}", "prompt": f"row {number}", "more": "x" * 500} for number in range(60_000)))
    before = resident()
    ingest_job(path, input={"id_column": "id"})
    assert resident() - before < 24 << 20


def test_settings_of_rows_survive_the_way_through_json(tmp_path: Path, write_rows: Write, ingest_job: Ingest) -> None:
    settings = {"logit_bias": {"7": 2.5, "3": -1}, "bad_words": [[5, 6], "xy"], "stop": ["a"], "repetition_penalty": 1.5}
    store = ingest_job(write_rows({"prompt": "a", "sampling_params": settings}, {"prompt": "b"}))
    again = InputStore.restored(tmp_path / "store0", json.loads(json.dumps(store.state())))
    assert again.sampling == store.sampling and len(again.sampling) == 2
    assert again.sampling[0].logit_bias == ((3, -1.0), (7, 2.5)) and (5, 6) in again.sampling[0].bad_words
