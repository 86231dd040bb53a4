"""JSON Lines, plain or compressed with gzip or zstd: one object per line, every faulty line a row with an error.

Lines are separated by `\\n`; blank ones are no rows. A file whose first lines are all faulty is not JSON Lines and is refused
as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokabatch.errors import InputError, RowError
from tokabatch.input.files.lines import MAX_LINE_BYTES, Line, read_lines
from tokabatch.input.files.paths import InputFile
from tokabatch.input.files.strict_json import BAD_JSON, parse_object
from tokabatch.input.rows import MAX_BATCH_BYTES, MAX_BATCH_ROWS, Row, RowBatch
from tokabatch.number_text import counted, first_counted

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_LEADING_FAULTS = 100
"""Faulty lines at the beginning of a file that show it is in another format."""


@dataclass(frozen=True, slots=True)
class LineRow:
    """A row on a line: its columns (None if the line is no object) and their JSON text, and the further fields of `Row`."""

    columns: Mapping[str, Any] | None
    text: bytes
    error: RowError | None = None
    prompt: Mapping[str, Any] | None = None


Split = Callable[[dict[str, Any], str], Sequence[LineRow]]
"""Makes rows of a line's object; the text is the line's place, for messages."""


@dataclass(frozen=True, slots=True)
class JsonLinesReader:
    """Reads its files one after another. `schema` is None: the types of JSON values are found as rows are read. An object is a
    row, unless `split` makes several of it."""

    name: str
    files: tuple[InputFile, ...]
    max_line_bytes: int = MAX_LINE_BYTES
    schema: None = None
    split: Split | None = None

    def batches(self, columns: Collection[str] | None = None) -> Iterator[RowBatch]:
        """Iterate over the rows. `columns` is ignored: a JSON object is parsed as a whole."""
        rows: list[Row] = []
        texts: list[bytes] = []
        begins: list[tuple[int, str, int]] = []
        held = index = 0
        expected: tuple[str, int] | None = None
        for file, line, found in self._lines():
            held += line.length
            for each in found:
                if (file.shown, line.number) != expected:
                    begins.append((index, file.shown, line.number))
                expected = file.shown, line.number + 1
                rows.append(Row(index, each.columns, each.error, each.prompt))
                texts.append(each.text)
                index += 1
                if len(rows) >= MAX_BATCH_ROWS or held >= MAX_BATCH_BYTES:
                    yield RowBatch(rows, texts, begins=begins)
                    rows, texts, begins, held = [], [], [], 0
        if rows:
            yield RowBatch(rows, texts, begins=begins)

    def _lines(self) -> Iterator[tuple[InputFile, Line, Sequence[LineRow]]]:
        """Iterate over the lines, each with its rows."""
        for file in self.files:
            leading = before = 0
            for line in read_lines(file, self.max_line_bytes):
                if line.number == 1 and line.data is not None:
                    line = replace(line, data=line.data.removeprefix(BYTE_ORDER_MARK))
                if line.data is not None and (not line.data or line.data.isspace()):
                    continue
                rows = self._rows(file, line)
                leading += rows[0].columns is None and leading == before
                before += 1
                if leading == MAX_LEADING_FAULTS:
                    raise InputError(
                        f"{file.path} is not JSON Lines: not one of its {first_counted(leading, 'line')} is an object "
                        f"({rows[0].error}). Write one JSON object a line; CSV becomes that with "
                        "pandas.read_csv(...).to_json(..., orient='records', lines=True)"
                    )
                yield file, line, rows

    def _rows(self, file: InputFile, line: Line) -> Sequence[LineRow]:
        """Return the rows of a line, at least one."""
        place = f"{file.shown} line {line.number} (byte {line.offset})"
        if line.data is None:
            limit = self.max_line_bytes
            fault = f"{place}: the line is {counted(line.length, 'byte')} long, the limit is {limit}; is the file JSON Lines?"
            return [LineRow(None, b"", RowError(BAD_JSON, fault))]
        parsed = parse_object(line.data)
        if isinstance(parsed, RowError):
            return [LineRow(None, b"", RowError(parsed.code, f"{place}: {parsed.message}"))]
        return self.split(parsed, place) if self.split else [LineRow(parsed, line.data)]


def open_files(name: str, files: tuple[InputFile, ...]) -> JsonLinesReader:
    """Open `.jsonl` files: the registry's entry point."""
    return JsonLinesReader(name, files)
