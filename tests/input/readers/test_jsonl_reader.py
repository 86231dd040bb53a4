"""JSON Lines: every line that is not blank is a row or a row with a fault, whatever its bytes are."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.errors import InputError
from tokabatch.input.files.lines import split_lines
from tokabatch.input.readers import open_path
from tokabatch.input.readers.jsonl import JsonLinesReader
from tokabatch.input.rows import Row, RowPlaces

BAD_LINES = {
    "open": (b'{"a": 1', "bad_json"),
    "words": (b"hello", "bad_json"),
    "list": (b"[1, 2]", "bad_json"),
    "number": (b"7", "bad_json"),
    "null": (b"null", "bad_json"),
    "two": (b'{"a": 1} {"a": 2}', "bad_json"),
    "duplicate": (b'{"a": 1, "a": 1}', "bad_json"),
    "nested_duplicate": (b'{"a": {"b": 1, "b": 2}}', "bad_json"),
    "nan": (b'{"a": NaN}', "bad_json"),
    "infinity": (b'{"a": -Infinity}', "bad_json"),
    "overflow": (b'{"a": 1e999}', "bad_json"),
    "deep": (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "bad_json"),
    "very_deep": (b'{"a": ' + b"[" * 500_000, "bad_json"),
    "digits": (b'{"a": ' + b"9" * 10_000 + b"}", "bad_json"),
    "control": (b'{"a": "tab\there"}', "bad_json"),
    "single_quotes": (b"{'a': 1}", "bad_json"),
    "trailing_comma": (b'{"a": 1,}', "bad_json"),
    "utf8": (b'{"a": "\xff\xfe"}', "bad_utf8"),
    "utf8_cut": (b'{"a": "\xc3', "bad_utf8"),
    "utf8_surrogate": (b'{"a": "\xed\xa0\x80"}', "bad_utf8"),
    "surrogate": (b'{"a": "\\ud800"}', "bad_unicode"),
    "surrogate_key": (b'{"\\uDC00": 1}', "bad_unicode"),
}


def read(path: Path | str) -> list[Row]:
    return [row for batch in open_path(str(path)).batches() for row in batch.rows]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_one_error_row_with_its_place(name: str, write_rows: Callable[..., Path]) -> None:
    line, code = BAD_LINES[name]
    rows = read(write_rows({"a": 1}, line, {"a": 2}))
    assert [row.columns for row in rows] == [{"a": 1}, None, {"a": 2}]
    error = rows[1].error
    assert error is not None and error.code == code
    assert "line 2" in error.message and "byte 9" in error.message
    assert len(error.message) < 500
    assert [row.index for row in rows] == [0, 1, 2]


def test_lines_end_at_newlines_only(write_rows: Callable[..., Path]) -> None:
    separators = "a\u2028b\u2029c\x85d"
    line = json.dumps({"a": separators}, ensure_ascii=False).encode() + b"\r"
    assert [row.columns for row in read(write_rows(line, {"a": "x"}))] == [{"a": separators}, {"a": "x"}]


def test_byte_order_mark_and_last_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}')
    assert [row.columns for row in read(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("packed", (bytes, gzip.compress, zstandard.compress))
def test_blank_lines_are_no_rows_and_count_as_lines(packed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl{'' if packed is bytes else '.gz' if packed is gzip.compress else '.zst'}"
    path.write_bytes(packed(b'\xef\xbb\xbf\r\n{"a": 1}\n\n \t\r\n{"a": 2}\n{"a": 3}\n\n{"a"\n\n \n'))
    batches = list(open_path(str(path)).batches())
    rows = [row for batch in batches for row in batch.rows]
    assert [(row.index, row.columns) for row in rows] == [(0, {"a": 1}), (1, {"a": 2}), (2, {"a": 3}), (3, None)]
    places = RowPlaces([begin for batch in batches for begin in batch.begins])
    assert [places.line(row).rpartition(" ")[2] for row in range(4)] == ["2", "5", "6", "8"]
    assert rows[3].error is not None and "line 8" in rows[3].error.message


def test_blank_lines_do_not_hide_that_a_file_is_not_json_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"question,answer\n\n" * 200)
    with pytest.raises(InputError, match="not JSON Lines: not one of its first 100 lines"):
        read(tmp_path / "x.jsonl")


def test_valid_escapes_pass(write_rows: Callable[..., Path]) -> None:
    rows = read(write_rows(b'{"a": "\\ud83d\\ude00 \\\\ud800 [[[{"}'))
    assert rows[0].columns == {"a": "\U0001f600 \\ud800 [[[{"}


def test_a_line_beyond_the_limit_is_skipped_without_being_held(write_rows: Callable[..., Path]) -> None:
    reader = open_path(str(write_rows({"a": "x" * 5000}, {"a": "y"})))
    assert isinstance(reader, JsonLinesReader)
    short = JsonLinesReader(reader.name, reader.files, max_line_bytes=1000)
    rows = [row for batch in short.batches() for row in batch.rows]
    assert rows[0].error is not None and "limit is 1000" in rows[0].error.message
    assert rows[1].columns == {"a": "y"}


@settings(max_examples=200)
@given(st.binary(max_size=60).map(lambda raw: raw.replace(b"q", b"\n")), st.integers(1, 9), st.integers(0, 20))
def test_split_lines_equals_splitting_at_once(data: bytes, block: int, limit: int) -> None:
    blocks = iter([data[at : at + block] for at in range(0, len(data), block)])
    lines = list(split_lines(blocks, limit))
    expected = data.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    assert [line.data for line in lines] == [text if len(text) <= limit else None for text in expected]
    assert [line.length for line in lines] == [len(text) for text in expected]
    assert all(data[line.offset : line.offset + line.length] == text for line, text in zip(lines, expected, strict=True))


def compressed(kind: str, data: bytes) -> bytes:
    return gzip.compress(data) if kind == "gz" else zstandard.compress(data)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_of_several_members(kind: str, tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"a": number}).encode() + b"\n" for number in range(5000))
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(compressed(kind, lines[:30_001]) + compressed(kind, lines[30_001:]))
    assert [row.columns for row in read(path)] == [{"a": number} for number in range(5000)]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("cut", [1, 9, 2000])
def test_a_compressed_file_cut_short_is_refused(kind: str, cut: int, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(compressed(kind, b"".join(b'{"a": %d}\n' % number**3 for number in range(9000)))[:-cut])
    with pytest.raises(InputError, match="cut short"):
        read(path)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_damaged_compressed_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(b"this was never compressed\n" * 10)
    with pytest.raises(InputError, match="damaged"):
        read(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_compression_is_read_from_the_content(kind: str, name: str, tmp_path: Path) -> None:
    data = b"".join(json.dumps({"a": number}).encode() + b"\n" for number in range(3000))
    (tmp_path / name).write_bytes(compressed(kind, data) if kind else data)
    assert [row.columns for row in read(tmp_path / name)] == [{"a": number} for number in range(3000)]


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    return sink.getvalue().to_pybytes()


FOREIGN = {
    "parquet": (parquet(), "a Parquet file.*rename it to .parquet"),
    "array": (b'[{"a": 1}, {"a": 2}]', "a JSON array.*jq -c"),
    "array_lines": (b'\xef\xbb\xbf[\n  {\n "a": 1}\n]', "a JSON array.*jq -c"),
    "indented": (b'{\n  "a": 1\n}\n', "JSON over several lines.*jq -c"),
    "utf_16": ('{"a": 1}\n'.encode("utf-16"), "UTF-16 text.*iconv"),
    "utf_16_le": ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16 text.*iconv"),
    "utf_16_be": ('{"a": 1}\n'.encode("utf-16-be"), "UTF-16 text.*iconv"),
    "utf_32": ('{"a": 1}\n'.encode("utf-32"), "UTF-32 text.*iconv -f UTF-32"),
    "bzip2": (bz2.compress(b"{}"), "bunzip2"),
    "xz": (lzma.compress(b"{}"), "unxz"),
    "zip": (b"PK\x03\x04" + b"\0" * 40, "a ZIP archive"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html>\n<html>", "a web page"),
    "csv": (b"a,b\n" + b"1,2\n" * 200, "not one of its first 100 lines.*read_csv"),
}


@pytest.mark.parametrize("outside", ["", "gz"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_refused_once_with_the_remedy(name: str, outside: str, tmp_path: Path) -> None:
    data, message = FOREIGN[name]
    (tmp_path / "x.jsonl").write_bytes(compressed(outside, data) if outside else data)
    with pytest.raises(InputError, match=f"(?s)x.jsonl is .*{message}"):
        read(tmp_path / "x.jsonl")


def test_faults_at_the_beginning_of_a_file_are_rows_while_they_are_few(write_rows: Callable[..., Path]) -> None:
    rows = read(write_rows(*[b"{"] * 99, {"a": 1}, *[b"{"] * 300))
    assert sum(row.error is not None for row in rows) == 399 and rows[99].columns == {"a": 1}
