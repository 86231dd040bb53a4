"""JSON Lines read back equal the rows that pyarrow itself makes of a table."""

from __future__ import annotations

import io
import json
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.output.json_lines import flatten, write_json_lines

TYPE = pa.list_(pa.struct([("a", pa.float32()), ("b", pa.list_(pa.int32())), ("c", pa.large_list(pa.string()))]))
ITEM = st.none() | st.fixed_dictionaries(
    {
        "a": st.none() | st.floats(width=32),
        "b": st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=3),
        "c": st.none() | st.lists(st.none() | st.text(max_size=2), max_size=3),
    }
)
ROWS = st.lists(st.none() | st.lists(ITEM, max_size=3), min_size=1, max_size=8)


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=200, deadline=None)
@given(ROWS, ROWS, st.integers(0, 3))
def test_lines_equal_the_rows_of_pyarrow(first: list[Any], second: list[Any], skip: int) -> None:
    column = pa.chunked_array([pa.array(first, TYPE), pa.array(second, TYPE)])
    table = pa.table({"x": column, "n": range(len(column))}).slice(skip)
    file = io.BytesIO()
    write_json_lines(table, file)
    lines = file.getvalue().decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [finite(row) for row in table.to_pylist()]


def test_no_rows_write_nothing() -> None:
    file = io.BytesIO()
    write_json_lines(pa.table({"x": pa.array([], TYPE)}), file)
    assert file.getvalue() == b""


def test_cells_of_csv_hold_what_extension_types_stand_for() -> None:
    values = {
        "uuid": (pa.uuid(), pa.binary(16), UUID(int=1).bytes, "00000000-0000-0000-0000-000000000001"),
        "grid": (pa.fixed_shape_tensor(pa.float32(), (2,)), pa.list_(pa.float32(), 2), [1.5, 2], "[1.5,2.0]"),
    }
    columns = {
        name: pa.ExtensionArray.from_storage(kind, pa.array([value, None], storage))
        for name, (kind, storage, value, _) in values.items()
    }
    cells = flatten(pa.table(columns | {"text": ['"a', None], "bytes": [b"\xff", None]})).to_pylist()
    assert cells[0] == {name: cell for name, (*_, cell) in values.items()} | {"text": '"a', "bytes": "/w=="}
    assert set(cells[1].values()) == {None}


def test_times_beyond_the_years_that_arrow_prints_can_be_read_back() -> None:
    """Arrow has `<value out of range: ...>` for them or, with a time zone, another year."""
    far, near = [10**15, -(10**14), None, 0], ["1970-01-01 00:00:00", "1970-01-01 01:00:00+0100"]
    seconds = pa.array(far, pa.timestamp("s"))
    table = pa.table(
        {
            "plain": seconds,
            "zone": seconds.cast(pa.timestamp("s", "Europe/Berlin")),
            "day": pa.array([2**31 - 1, -(2**31), None, 0], pa.int32()).cast(pa.date32()),
            "nested": pa.array(
                [[{"at": each, "n": 1}] for each in far], pa.list_(pa.struct({"at": seconds.type, "n": pa.int8()}))
            ),
            "map": pa.array([[("a", each)] for each in far], pa.map_(pa.string(), seconds.type)),
            "coded": seconds.dictionary_encode(),
        }
    )
    file = io.BytesIO()
    write_json_lines(table, file)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    for row, count in zip(rows[:2], far, strict=False):
        texts = [row["plain"], row["zone"].removesuffix("Z"), row["nested"][0]["at"], row["map"][0][1], row["coded"]]
        assert {np.datetime64(text, "s").astype(int) for text in texts} == {count}
    assert [np.datetime64(row["day"], "D").astype(int) for row in rows[:2]] == [2**31 - 1, -(2**31)]
    assert rows[2]["plain"] is None and rows[2]["nested"] == [{"at": None, "n": 1}]
    assert [rows[3]["plain"], rows[3]["zone"]] == near
    assert [cell for row in flatten(table).to_pylist() for cell in row.values() if "out of range" in str(cell)] == []


def test_durations_are_written_in_iso_8601() -> None:
    spans = {"s": [93_784, 0, -3600], "ms": [93_784_500, 86_400_000, None], "ns": [1, -60_000_000_000, 2**62]}
    texts = {
        "s": ["P1DT2H3M4S", "PT0S", "-PT1H"],
        "ms": ["P1DT2H3M4.5S", "P1D", None],
        "ns": ["PT0.000000001S", "-PT1M", "P53375DT23H53M38.427387904S"],
    }
    for unit, counts in spans.items():
        column = pa.array(counts, pa.duration(unit))
        nested = pa.StructArray.from_arrays([column, pa.array(["x"] * 3)], ["span", "name"])
        table, file = pa.table({"x": column, "y": nested}), io.BytesIO()
        write_json_lines(table, file)
        lines = [json.loads(line) for line in file.getvalue().splitlines()]
        assert lines == [{"x": text, "y": {"span": text, "name": "x"}} for text in texts[unit]]
        assert flatten(table)["x"].to_pylist() == texts[unit]
        assert flatten(table).schema == flatten(table.schema.empty_table()).schema
        pandas_reads = [None if text is None else pd.Timedelta(text) for text in texts[unit]]
        assert pandas_reads == [None if each is None else pd.Timedelta(each, unit) for each in counts]
