"""The input's columns come out of a run as they went in, whatever their Arrow type, or the job is refused at the start."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.scripted_run import carried, scripted_job, scripted_run

from tokabatch import plan
from tokabatch.errors import InputError, OutputError
from tokabatch.input.store.json_types import JSON_TEXTS_KEY, JsonType, Place, place_name
from tokabatch.output.excerpts import excerpts
from tokabatch.output.export import Selection, export
from tokabatch.runner.score import score

COLORS = pa.array(["red", "green", None, "red"]).dictionary_encode()
RUNS = pa.RunEndEncodedArray.from_arrays([2, 4], ["a", None])
UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16, None, b"y" * 16, b"z" * 16], pa.binary(16)))
COLUMNS: dict[str, pa.Array[Any]] = {
    "string_view": pa.array(["web", None, "x" * 40, ""], pa.string_view()),
    "binary_view": pa.array([b"\xff", None, b"x" * 40, b""], pa.binary_view()),
    "large_string": pa.array(["web", None, "x" * 40, ""], pa.large_string()),
    "large_list": pa.array([["a"], None, [], [None, "b"]], pa.large_list(pa.string())),
    "dictionary": COLORS,
    "dictionary in lists": pa.ListArray.from_arrays([0, 1, 1, 3, 4], COLORS),
    "dictionary in structs": pa.StructArray.from_arrays([COLORS], ["kind"]),
    "dictionary in maps": pa.MapArray.from_arrays([0, 1, 2, 2, 3], ["p", "q", "r"], COLORS.slice(0, 3)),
    "list_view": pa.array([[1], [], None, [2, 3]], pa.list_view(pa.int32())),
    "list_view of string_view": pa.array([["a"], [], None, [None, "b" * 30]], pa.list_view(pa.string_view())),
    "fixed size list": pa.array([[1, 2], None, [3, None], [4, 5]], pa.list_(pa.int32(), 2)),
    "map": pa.array([[("a", 1)], [], None, [("b", None)]], pa.map_(pa.string(), pa.int32())),
    "uuid": UUIDS,
    "uuid in lists": pa.ListArray.from_arrays([0, 1, 1, 3, 4], UUIDS),
    "decimal128": pa.array([Decimal("1.50"), None, Decimal("-2.25"), Decimal(0)], pa.decimal128(30, 2)),
    "decimal256": pa.array([Decimal("1.50"), None, Decimal("-2.25"), Decimal(0)], pa.decimal256(60, 2)),
    "duration": pa.array([1, None, 3, 4], pa.duration("us")),
    "half float": pa.array([np.float16(1.5), None, np.float16(2), np.float16(-3)], pa.float16()),
    "time32": pa.array([1, None, 3, 4], pa.time32("ms")),
    "time64": pa.array([1000, None, 3000, 4000], pa.time64("ns")),
    "timestamp with a zone": pa.array([1, None, 3, 4], pa.timestamp("us", "Europe/Berlin")),
    "timestamp in seconds": pa.array([1, None, 3, 4], pa.timestamp("s")),
    "date beyond python": pa.array([10**7, None, 0, -(10**7)], pa.date32()),
    "null": pa.nulls(4),
    "list of null": pa.array([[None], [], None, [None, None]], pa.list_(pa.null())),
    "fixed size binary": pa.array([b"abc", None, b"def", b"ghi"], pa.binary(3)),
    "uint64": pa.array([2**64 - 1, None, 0, 1], pa.uint64()),
    "not null inside": pa.array([[1], None, [], [2]], pa.list_(pa.field("element", pa.int32(), nullable=False))),
    "two fields of one name": pa.StructArray.from_arrays([pa.array([1, 2, 3, 4]), pa.array(["a", None, "b", "c"])], ["k", "k"]),
}


def write(path: Path, column: pa.Array[Any] | pa.ChunkedArray, row_group_size: int = 2, **options: Any) -> Path:
    questions = [f"What is {row}?" for row in range(len(column))]
    pq.write_table(pa.table({"question": questions, "c": column}), path, row_group_size=row_group_size, **options)
    return path


def compare(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    """The same values, and the same type but for encodings."""
    assert found.is_null().to_pylist() == expected.is_null().to_pylist()
    found.validate(full=True)
    try:
        assert found.to_pylist() == expected.to_pylist()
    except (ValueError, OverflowError):  # Python has no such value.
        assert found.equals(expected)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_type_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    try:
        file = write(tmp_path / "rows.parquet", COLUMNS[name])
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this version of pyarrow does not write it: {error}")
    assert scripted_run(file, tmp_path / "out").ok == 8
    expected = pq.read_table(file)["c"]
    found = carried(tmp_path / "out", "c")
    compare(found, expected)
    if "view" not in name and "dictionary" not in name:
        assert found.type.equals(expected.type)
    assert scripted_run(file, tmp_path / "out").ok == 8, "the run that is there is not recognised"


def test_values_beyond_python_reach_judges_and_pages_as_null(tmp_path: Path) -> None:
    columns = {
        "date": COLUMNS["date beyond python"],
        "time": pa.array([2**52, 0, -(2**52), None], pa.timestamp("ms")),
        "span": pa.array([2**50, 0, None, 1], pa.duration("s")),
    }
    table = pa.table({"question": [f"What is {row}?" for row in range(4)], "answer": ["x"] * 4, **columns})
    pq.write_table(table, tmp_path / "rows.parquet")
    judge = tmp_path / "judge.py"
    judge.write_text(
        "COLUMNS = {'missing': int}\ndef verify(text, row): return {'score': 1, 'missing': list(row.values()).count(None)}"
    )
    out = tmp_path / "out"
    summary = scripted_run(tmp_path / "rows.parquet", out, verify={"kind": str(judge)})
    assert (summary.ok, summary.unverified) == (8, 0)
    assert carried(out, "missing").to_pylist() == [3, 1, 2, 2]
    for name, column in columns.items():
        compare(carried(out, name), pa.chunked_array([column]))
    assert [excerpt.columns["date"] for excerpt in excerpts(out, 4)["right"]] == [None, None, date(1970, 1, 1), None]
    scored = score(out, ["verify.kind=exact", "verify.answer=answer"])
    assert (scored.judged, scored.reasons) == (8, {})


def test_tags_that_pandas_wrote_as_categories(tmp_path: Path) -> None:
    """Each row group has a dictionary of its own, inside lists."""
    groups = [pa.ListArray.from_arrays([0, 1, 2], pa.array(words).dictionary_encode()) for words in (["a", "b"], ["c", "a"])]
    with pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema({"question": pa.string(), "c": groups[0].type})) as writer:
        for group in groups:
            writer.write_table(pa.table({"question": ["x", "y"], "c": group}))
    scripted_run(tmp_path / "rows.parquet", tmp_path / "out")
    assert carried(tmp_path / "out", "c").to_pylist() == [["a"], ["b"], ["c"], ["a"]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (COLORS, pa.array(["blue"])),
        (pa.array(["blue"], pa.large_string()), COLORS),
        (pa.array([1], pa.int32()), pa.array([2**40], pa.int64())),
        (pa.array(["a"], pa.string_view()), pa.array(["b"], pa.large_string())),
        (pa.array([[1]], pa.list_(pa.int32())), pa.array([[2**40]], pa.list_(pa.int64()))),
        (pa.nulls(2), COLORS),
    ],
)
def test_files_whose_types_differ_but_fit(first: pa.Array[Any], second: pa.Array[Any], tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    files = [write(tmp_path / "rows" / f"{number}.parquet", column) for number, column in enumerate((first, second))]
    scripted_run(tmp_path / "rows", tmp_path / "out")
    assert carried(tmp_path / "out", "c").to_pylist() == [
        value for file in files for value in pq.read_table(file)["c"].to_pylist()
    ]


def test_files_whose_types_do_not_fit_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "0.parquet", pa.array([2**60 + 1]))
    write(tmp_path / "rows" / "1.parquet", pa.array([0.5]))
    with pytest.raises(InputError, match=r"0\.parquet: its column 'c' .* Cast the column to one type"):
        scripted_run(tmp_path / "rows", tmp_path / "out")
    write(tmp_path / "rows" / "1.parquet", pa.array(["text"]))
    with pytest.raises(InputError, match="Cast them to one type in all files"):
        scripted_run(tmp_path / "rows", tmp_path / "out")


def test_a_type_that_parquet_does_not_hold_is_refused_with_the_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Parquet file brings one; a dataset of the hub may."""
    odd = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    file = write(tmp_path / "rows.parquet", pa.array([1]))
    monkeypatch.setattr(
        "tokabatch.input.readers.parquet._fitted", lambda batch, field: odd if field.name == "c" else batch[field.name]
    )
    real = pa.schema({"question": pa.string(), "c": odd.type})
    monkeypatch.setattr("tokabatch.input.readers.parquet.plain_schema", lambda schema: real)
    with pytest.raises(OutputError, match=r"column 'c' has the type month_day_nano_interval.*output\.columns"):
        scripted_run(file, tmp_path / "out")
    assert scripted_run(file, tmp_path / "out", output={"columns": ["question"]}).ok == 2


def test_an_extension_type_that_is_not_registered_stays_what_it_is(tmp_path: Path) -> None:
    meaning = {b"ARROW:extension:name": b"mine.colour", b"ARROW:extension:metadata": b"rgb"}
    schema = pa.schema([pa.field("question", pa.string(), nullable=False), pa.field("c", pa.int32(), metadata=meaning)])
    pq.write_table(pa.table({"question": ["x"], "c": [7]}, schema=schema), tmp_path / "rows.parquet")
    scripted_run(tmp_path / "rows.parquet", tmp_path / "out")
    (shard,) = (tmp_path / "out" / "data").iterdir()
    field = pq.read_schema(shard).field("c")
    assert meaning.items() <= (field.metadata or {}).items() and pq.read_table(shard)["c"].to_pylist() == [7, 7]


class Celsius(pa.ExtensionType):
    """An extension type of the user's own, whose values no Python can have."""

    def __init__(self) -> None:
        super().__init__(pa.float64(), "tests.celsius")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Celsius:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type:
        return CelsiusScalar


class CelsiusScalar(pa.ExtensionScalar):
    def as_py(self, **_: Any) -> Any:
        if self.value is not None:
            raise RuntimeError("too cold")


def test_an_extension_type_of_the_users_own(tmp_path: Path) -> None:
    pa.register_extension_type(Celsius())
    try:
        column = pa.ExtensionArray.from_storage(Celsius(), pa.array([1.5, None, 3.0]))
        file = write(tmp_path / "rows.parquet", column)
        scripted_run(file, tmp_path / "out")
        found = carried(tmp_path / "out", "c")
        assert found.type == Celsius() and found.combine_chunks().storage.to_pylist() == [1.5, None, 3.0]
        summary = scripted_run(file, tmp_path / "asked", prompt={"template": "{{ question }} {{ c }}"})
        assert dict(summary.error_counts) == {"bad_type": 4, "missing_field": 2}
    finally:
        pa.unregister_extension_type("tests.celsius")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", ""]), inner, max_size=3),
    max_leaves=8,
)


def same_json(found: Any, given: Any) -> bool:
    """A value is itself, or its JSON text; keys that a row does not have are null; whole numbers may be fractions."""
    if isinstance(found, str):
        return found == given or json.loads(found) == given
    if isinstance(found, dict) and isinstance(given, dict):
        return all(same_json(value, given.get(name)) for name, value in found.items()) and given.keys() <= found.keys()
    if isinstance(found, list) and isinstance(given, list):
        return len(found) == len(given) and all(map(same_json, found, given))
    return found == given


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(JSON_VALUES, min_size=1, max_size=5))
def test_json_values_come_out_as_they_went_in(values: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder, "rows.jsonl"), Path(folder, "out")
        rows.write_text("".join(json.dumps({"question": "x", "c": value}) + "\n" for value in values))
        assert scripted_run(rows, out).ok == 2 * len(values)
        found = carried(out, "c").to_pylist()
    assert len(found) == len(values) and all(map(same_json, found, values)), found


def test_values_of_several_kinds_reach_judges_as_they_are(tmp_path: Path) -> None:
    """In a run, when it is judged again, and on the page; only the output's columns, which have one type, are JSON text."""
    mixed: list[Any] = ["7", 7, None, ["a", 2, None], {"k": [1, "x"]}, {"k": "1"}, 2**70, True]
    lines = [{"question": "x", "id": "n", "c": each, "text": each, "list": [each, each], "in": {"c": each}} for each in mixed]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = tmp_path / "judge.py"
    judge.write_text("COLUMNS = {'saw': str}\ndef verify(text, row): return {'score': 1, 'saw': repr(row)}\n")
    out = tmp_path / "out"
    scripted_run(tmp_path / "rows.jsonl", out, verify={"kind": str(judge)})

    def saw() -> list[dict[str, Any]]:
        found = [ast.literal_eval(text) for text in carried(out, "saw").to_pylist()]
        return [{name: row[name] for name in line} for row, line in zip(found, lines, strict=True)]

    assert saw() == lines
    assert carried(out, "c").to_pylist() == [None if each is None else json.dumps(each) for each in mixed]
    judge.write_text(judge.read_text() + "# edited\n")
    score(out)
    assert saw() == lines
    assert [each.columns["c"] for each in excerpts(out, len(mixed))["right"]] == mixed
    renamed = [{"input_text": line["text"], **{name: line[name] for name in ("c", "list", "in")}} for line in lines]
    for nested in (True, False):
        export(out, tmp_path / "all.jsonl", Selection(nested))
        exported = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
        assert [{name: row[name] for name in renamed[0]} for row in exported[:: 1 if nested else 2]] == renamed
    export(out, tmp_path / "some.jsonl", Selection(columns=("text", "c")))
    assert json.loads((tmp_path / "some.jsonl").read_text().splitlines()[2])["c"] == 7
    notes = plan(scripted_job(tmp_path / "rows.jsonl", tmp_path / "new")).notes
    assert any(note.endswith("JSON text in the output: c, text, list[], in.c") for note in notes), notes


@pytest.mark.parametrize("earlier", [False, True])
def test_places_of_json_text_may_be_called_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    """A folder of an earlier version names the places by texts, of which two may be equal."""
    lines: list[dict[str, Any]] = [
        {"question": "x", "a.b": 1, "a": {"b": "hello"}, "t": [1], "t[]": "no JSON", "in.text": {}, "text": 1},
        {"question": "x", "a.b": "x", "a": {"b": "7y"}, "t": ["1"], "t[]": "7y", "in.text": {}, "text": "1"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge, out = tmp_path / "judge.py", tmp_path / "out"
    judge.write_text("COLUMNS = {'saw': str}\ndef verify(text, row): return {'score': 1, 'saw': repr(row)}\n")
    job = scripted_job(tmp_path / "rows.jsonl", out, verify={"kind": str(judge)})
    notes = plan(job).notes
    assert "input columns that no single type fits are JSON text in the output: a.b, t[], in.text, text" in notes
    if earlier:
        of_today = JsonType.json_texts

        def by_name(kind: JsonType, place: Place) -> Iterator[Any]:
            return (each if isinstance(each, str) else place_name(each) for each in of_today(kind, place))

        monkeypatch.setattr(JsonType, "json_texts", by_name)
    scripted_run(tmp_path / "rows.jsonl", out, verify={"kind": str(judge)})
    monkeypatch.undo()
    stored = pq.read_schema(next((out / "data").iterdir())).metadata[JSON_TEXTS_KEY]
    assert (b'"a.b", "t[]"' in stored) if earlier else (b'["a.b"], ["t", null]' in stored)
    judge.write_text(judge.read_text() + "# edited\n")
    score(out)
    saw = [ast.literal_eval(text) for text in carried(out, "saw").to_pylist()]
    assert [{name: row[name] for name in line} for row, line in zip(saw, lines, strict=True)] == lines
    assert [each.columns["a"] for each in excerpts(out, 2)["right"]] == [line["a"] for line in lines]
    export(out, tmp_path / "all.jsonl", Selection(True))
    exported = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    own = [{name: row[name] for name in lines[0] if name != "text"} | {"text": row["input_text"]} for row in exported]
    assert own == lines
    assert scripted_run(tmp_path / "rows.jsonl", out, verify={"kind": str(judge)}).ok == 4


LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    (pa.int8(), st.integers(-128, 127)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float16(), st.floats(width=16, allow_nan=False).map(np.float16)),
    (pa.float64(), st.floats(allow_nan=False)),
    *((kind, st.text(max_size=20)) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, st.binary(max_size=20)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    *((pa.timestamp(unit), st.integers(-(2**40), 2**40)) for unit in ("s", "ms", "us", "ns")),
    (pa.timestamp("ms", "UTC"), st.integers(-(2**60), 2**60)),
    *((pa.duration(unit), st.integers(-(2**30), 2**30)) for unit in ("s", "ms", "us", "ns")),
    (pa.time32("s"), st.integers(0, 86399)),
    (pa.time64("us"), st.times()),
    *((kind, st.decimals(-99, 99, places=2)) for kind in (pa.decimal128(9, 2), pa.decimal256(50, 2))),
    (pa.null(), st.none()),
]
SHAPES = ["leaf", "leaf", "dictionary", "list", "view", "fixed", "struct", "map", "uuid"]
ENCODABLE = {pa.string(), pa.int64(), pa.date32(), pa.bool_(), pa.binary(), pa.decimal128(9, 2)}


@st.composite
def arrow_arrays(draw: st.DrawFn, count: int, depth: int = 2) -> pa.Array[Any]:
    """`count` values of any type."""
    shape = draw(
        st.sampled_from(["leaf", "leaf", "dictionary", "list", "view", "fixed", "struct", "map", "uuid"] if depth else ["leaf"])
    )
    nulls = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    if shape == "uuid":
        ids = [None if null else draw(st.uuids()).bytes for null in nulls]
        return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(ids, pa.binary(16)))
    if shape in ("leaf", "dictionary"):
        kind, values = draw(st.sampled_from([leaf for leaf in LEAVES if shape == "leaf" or leaf[0] in ENCODABLE]))
        array = pa.array([None if null else draw(values) for null in nulls], kind)
        return array.dictionary_encode() if shape == "dictionary" else array
    mask = pa.array(nulls, pa.bool_())
    if shape == "struct":
        children = [draw(arrow_arrays(count, depth - 1)) for _ in range(draw(st.integers(1, 2)))]
        return pa.StructArray.from_arrays(children, names=["x", "y"][: len(children)], mask=mask)
    if shape == "fixed":
        size = draw(st.integers(1, 2))
        return pa.FixedSizeListArray.from_arrays(draw(arrow_arrays(count * size, depth - 1)), size, mask=mask)
    sizes = [0 if null else draw(st.integers(0, 2)) for null in nulls]
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    child = draw(arrow_arrays(int(offsets[-1]), depth - 1))
    if shape == "map":
        keys = pa.array([str(number) for number in range(len(child))])
        return pa.MapArray.from_arrays(pa.array(offsets), keys, child, mask=mask)
    if shape == "view":
        return pa.ListViewArray.from_arrays(pa.array(offsets[:-1]), pa.array(sizes, pa.int32()), child, mask=mask)
    if draw(st.booleans()):
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), child, mask=mask)
    return pa.ListArray.from_arrays(pa.array(offsets), child, mask=mask)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.data())
def test_any_arrow_column_comes_out_as_it_went_in(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    array = data.draw(arrow_arrays(count))
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "rows.parquet"), Path(folder, "out")
        try:
            write(file, array, data.draw(st.integers(1, 6)))
            expected = pq.read_table(file)["c"]
            expected.validate(full=True)
        except (pa.ArrowException, OSError):
            assume(False)  # PyArrow itself does not write it, or not read it back.
        assert scripted_run(file, out).ok == 2 * count
        compare(carried(out, "c"), expected)
