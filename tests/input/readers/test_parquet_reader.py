"""Parquet: columns with their types, several files, and faults of a file or a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokabatch.errors import InputError
from tokabatch.input.readers import open_path
from tokabatch.input.store.tokenized_input import InputStore

TEMPLATE = {"template": "{{ q }}"}


def test_types_survive_and_rows_come_in_any_order(tmp_path: Path, ingest_job: Callable[..., InputStore]) -> None:
    table = pa.table(
        {
            "q": [f"question {number}" for number in range(3000)],
            "when": pa.array(range(3000), pa.timestamp("us")),
            "kind": pa.array(["x", "y", None] * 1000).dictionary_encode(),
            "nested": [{"a": [number], "b": None} for number in range(3000)],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=700)
    store = ingest_job(tmp_path / "x.parquet", prompt=TEMPLATE)
    rows = np.random.default_rng(0).integers(0, 3000, 5000)
    plain = table.set_column(2, "kind", table["kind"].cast(pa.string()))
    assert store.columns(rows).equals(plain.take(rows))
    assert store.num_rows == 3000 and not store.errors
    store.close()


def test_files_are_united_by_name(tmp_path: Path, ingest_job: Callable[..., InputStore]) -> None:
    pq.write_table(pa.table({"q": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"n": pa.array([2], pa.int64()), "q": ["b"], "more": [True]}), tmp_path / "2.parquet")
    store = ingest_job(tmp_path, prompt=TEMPLATE)
    assert store.columns(np.arange(2)).to_pylist() == [
        {"q": "a", "n": 1, "more": None},
        {"q": "b", "n": 2, "more": True},
    ]


def test_types_that_cannot_be_united_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"q": ["a"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"q": [[1]]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match="other types"):
        open_path(str(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda _: b"PAR1", lambda _: b"", lambda data: data[:8] + b"\0" * 50 + data[58:]]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"q": ["some text"] * 200}), path, use_dictionary=False, write_page_checksum=True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"x\.parquet"):
        list(open_path(str(path)).batches())


def test_invalid_text_is_a_fault_of_its_row(tmp_path: Path, ingest_job: Callable[..., InputStore]) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"q": ["a", "b", "c"], "t": raw}), tmp_path / "x.parquet")
    store = ingest_job(tmp_path / "x.parquet", prompt=TEMPLATE)
    assert {row: error.code for row, error in store.errors.items()} == {1: "bad_utf8"}
    assert store.columns(np.arange(3)).column("t").to_pylist() == ["good", None, "fine"]


def test_a_missing_column_is_refused_before_any_row(tmp_path: Path, ingest_job: Callable[..., InputStore]) -> None:
    pq.write_table(pa.table({"q": ["a"], "r": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column question; its columns are q, r"):
        ingest_job(tmp_path / "x.parquet", prompt={"template": "{{ question }}"})


def test_structs_drop_their_nulls(
    tmp_path: Path, ingest_job: Callable[..., InputStore], texts: Callable[..., list[str]]
) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi", "name": None}], "sampling_params": {"max_tokens": 5, "top_k": None}},
        {"messages": [{"role": "user", "content": "ho", "name": "x"}], "sampling_params": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    store = ingest_job(tmp_path / "x.parquet", tokenizer="chat")
    assert not store.errors
    assert [store.sampling[index].max_tokens for index in store.params] == [5, 256]
    assert texts(store, "chat")[0] == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b'{"a": 1}\n', "JSON text.*rename it to .jsonl"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_a_file_of_another_format_named_parquet_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(data * 20)
    with pytest.raises(InputError, match=message):
        open_path(str(tmp_path / "x.parquet"))


def test_short_floats_have_their_shortest_digits(tmp_path: Path) -> None:
    kind = pa.struct({"x": pa.float32(), "l": pa.list_(pa.float16())})
    columns = {
        "single": pa.array([0.1, None, 1e10, float("inf")], pa.float32()),
        "double": pa.array([0.1, None, 1e10, float("inf")], pa.float64()),
        "nested": pa.array([{"x": 0.3, "l": [0.1, None]}, None, {"x": None, "l": None}, {"x": 2.5, "l": []}], kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    rows = [row.columns or {} for batch in open_path(str(tmp_path / "x.parquet")).batches() for row in batch.rows]
    assert [row["single"] for row in rows] == [row["double"] for row in rows] == [0.1, None, 1e10, float("inf")]
    assert [row["nested"] for row in rows] == [{"x": 0.3, "l": [0.1, None]}, None, {"x": None, "l": None}, {"x": 2.5, "l": []}]
