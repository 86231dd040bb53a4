"""JSON Lines read back equal the rows that pyarrow itself makes of a table."""

from __future__ import annotations

import io
import json
from typing import Any
from uuid import UUID

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
