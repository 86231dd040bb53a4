"""Rows are distinguished whatever file and column type they come in; damage is detected."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tokabatch.errors import RowError
from tokabatch.input.rows import Row, RowBatch
from tokabatch.input.store.row_digests import DigestSpool, RowDigests


def digests(folder: Path, *batches: RowBatch) -> RowDigests:
    folder.mkdir()
    spool = DigestSpool(folder)
    for batch in batches:
        spool.append(batch, [np.arange(row.index, dtype=np.int32) for row in batch.rows])
    return spool.finish()


def arrow(values: list[Any], kind: pa.DataType, **others: pa.Array) -> RowBatch:
    table = pa.RecordBatch.from_pydict({**others, "value": pa.array(values, kind)})
    return RowBatch([Row(index, {}) for index in range(len(values))], table=table)


WIDENED = [
    ([1, None, -3], pa.int32(), [1.0, None, -3.0], pa.float64()),
    ([1, None], pa.int64(), [Decimal("1.00"), None], pa.decimal128(10, 2)),
    ([Decimal("1.5")], pa.decimal128(5, 1), [Decimal("1.500")], pa.decimal128(10, 3)),
    ([None, None], pa.null(), [None, None], pa.struct({"a": pa.int64()})),
    ([{"a": 1}], pa.struct({"a": pa.int64()}), [{"b": None, "a": 1}], pa.struct({"b": pa.string(), "a": pa.float64()})),
    ([[1, None]], pa.list_(pa.int64()), [[1, None]], pa.large_list(pa.float64())),
    ([1_000], pa.timestamp("s"), [1_000_000_000], pa.timestamp("us")),
    (["é"], pa.string(), ["é"], pa.large_string()),
]


@pytest.mark.parametrize(("narrow", "before", "wide", "after"), WIDENED, ids=lambda value: str(value)[:20])
def test_a_row_is_the_same_in_every_type_that_it_fits(narrow, before, wide, after, tmp_path):
    there = digests(tmp_path / "a", arrow(narrow, before))
    here = digests(tmp_path / "b", arrow(wide, after, new=pa.nulls(len(wide), pa.string())))
    assert np.array_equal(there.content, here.content)


def test_other_values_have_other_digests(tmp_path):
    values = [
        arrow([1], pa.int64()), arrow([True], pa.bool_()), arrow(["1"], pa.string()), arrow([b"1"], pa.binary()),
        arrow([1.5], pa.float64()), arrow([[1]], pa.list_(pa.int64())), arrow([[1, None]], pa.list_(pa.int64())),
        arrow([{"a": 1}], pa.struct({"a": pa.int64()})), arrow([{"b": 1}], pa.struct({"b": pa.int64()})),
        arrow([None], pa.null()), arrow([1], pa.date32()), arrow([2], pa.int64()),
    ]  # fmt: skip
    seen = {int(digests(tmp_path / str(number), batch).content[0]) for number, batch in enumerate(values)}
    assert len(seen) == len(values)


def test_lines_count_by_their_text_and_unreadable_ones_by_their_fault(tmp_path):
    bad = RowError("bad_json", "here")
    lines = RowBatch([Row(0, {"a": 1}), Row(1, {"a": 1}), Row(2, None, bad)], [b'{"a":1}', b'{"a": 1}', b""])
    found = digests(tmp_path / "a", lines)
    assert len(found) == 3 and len(set(found.content.tolist())) == 3 and len(set(found.prompt.tolist())) == 3
    elsewhere = digests(tmp_path / "b", RowBatch([Row(0, None, RowError("bad_json", "there"))], [b""]))
    assert elsewhere.content[0] == found.content[2]


def test_they_come_back_from_their_file_unless_it_is_damaged(tmp_path):
    generator = np.random.default_rng(1)
    digests = RowDigests(generator.integers(0, 2**64, 5000, np.uint64), generator.integers(0, 2**64, 5000, np.uint64))
    path = tmp_path / "row_digests.parquet"
    assert RowDigests.read(path) is None
    content = bytearray(digests.to_parquet())
    path.write_bytes(content)
    found = RowDigests.read(path)
    assert found is not None and np.array_equal(found.content, digests.content)
    assert (found.content_sha256, found.prompt_sha256) == (digests.content_sha256, digests.prompt_sha256)
    assert found.head(10).content_sha256 != found.content_sha256
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert RowDigests.read(path) is None
    path.write_bytes(content[:100])
    assert RowDigests.read(path) is None
