"""Arrow types inferred from JSON: any rows can be written, and no distinction between values is lost."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.input.store.json_types import MAX_FIELDS, JsonType

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def column(values: list[Any]) -> pa.Array:
    kind = JsonType()
    for value in values:
        kind.add(value)
    encode = kind.encoder()
    return pa.array([encode(value) for value in values] if encode else values, type=kind.arrow())


def restored(shown: Any, given: Any) -> Any:
    """The value behind what the output shows: JSON text parsed, fields and lists walked, absent fields dropped."""
    if isinstance(shown, str) and not isinstance(given, str):
        return json.loads(shown)
    if isinstance(shown, str) and shown != given:
        return json.loads(shown)
    if isinstance(shown, list):
        return [restored(one, other) for one, other in zip(shown, given, strict=True)]
    if isinstance(shown, dict):
        assert all(shown[name] is None for name in shown.keys() - given.keys())
        return {name: restored(shown[name], given[name]) for name in given}
    return shown


@settings(max_examples=300, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=6))
def test_every_value_can_be_recovered_from_the_output(values: list[Any]) -> None:
    made = column(values)
    file = io.BytesIO()
    pq.write_table(pa.table({"v": made}), file)
    shown = pq.read_table(file).column("v").to_pylist()
    assert [restored(one, other) for one, other in zip(shown, values, strict=True)] == values


def test_objects_with_too_many_keys_and_deep_values_become_text() -> None:
    maps = [{f"k{number}": number} for number in range(MAX_FIELDS + 1)]
    assert column(maps).type == pa.string()
    assert json.loads(column(maps)[7].as_py()) == {"k7": 7}
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    kind = column([deep]).type
    depth = 0
    while isinstance(kind, pa.ListType):
        kind, depth = kind.value_type, depth + 1
    assert kind == pa.string() and depth < 20
