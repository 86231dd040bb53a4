"""Bytes of a file, decompressed and split into lines at `\\n` only, in bounded memory.

Compression is detected from the first bytes, since names can be wrong. A compressed file that is cut short or damaged is
refused, because the number of missing rows is unknown; a line beyond the size limit is reported and skipped, never held in
memory.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Protocol

import zstandard

from tokabatch.errors import InputError
from tokabatch.input.files.content import refuse_foreign
from tokabatch.input.files.paths import InputFile, refuse_unreachable
from tokabatch.number_text import counted

READ_BYTES = 1 << 20
COMPRESSED_READ_BYTES = 16 << 10
MAX_LINE_BYTES = 64 << 20
GZIP, GZIP_WINDOW = b"\x1f\x8b", 31
ZSTD = b"\x28\xb5\x2f\xfd"
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")
"""Bytes that no text has."""


@dataclass(frozen=True, slots=True)
class Line:
    """`number` counts from 1; `offset` is the first byte in the decompressed file; `data` is None if the line is too long."""

    number: int
    offset: int
    data: bytes | None
    length: int


class Decompressor(Protocol):
    """The common interface of zlib's and zstandard's decompression objects."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def read_lines(file: InputFile, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Iterate over the lines without their `\\n`; a last line without `\\n` counts, an empty piece after the last `\\n` does
    not. Raises InputError for a file of another format (see `refuse_foreign`)."""
    with file.open() as stream:
        begin = next(_raw_blocks(stream, file, COMPRESSED_READ_BYTES), b"")
        compression = ".gz" if begin.startswith(GZIP) else ".zst" if begin.startswith(ZSTD) else file.compression
        if compression == file.compression and begin.lstrip()[:1] == b"{":
            compression = ""
        if compression and not begin.startswith((GZIP, ZSTD)):
            refuse_foreign(file.path, begin)
            if begin and not _CONTROL.search(begin):
                raise InputError(
                    f"{file.path} is not compressed, despite its name: it is text that does not begin with a JSON object. "
                    "Fetch it again, or make it JSON Lines."
                )
        if compression == ".gz":
            blocks = _inflate(begin, stream, file, lambda: zlib.decompressobj(GZIP_WINDOW))
        elif compression == ".zst":
            blocks = _inflate(begin, stream, file, lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            blocks = chain((begin,), _raw_blocks(stream, file, READ_BYTES))
        first = next(blocks, b"")
        refuse_foreign(file.path, first)
        yield from split_lines(chain((first,), blocks), max_line_bytes)


def split_lines(blocks: Iterator[bytes], max_line_bytes: int) -> Iterator[Line]:
    """Split a byte stream into lines, holding at most `max_line_bytes` and one block."""
    pending: list[bytes] = []
    held = length = offset = 0
    number = 1
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            length += len(piece)
            data = b"".join((*pending, piece)) if length <= max_line_bytes else None
            yield Line(number, offset, data, length)
            offset, number = offset + length + 1, number + 1
            pending, held, length = [], 0, 0
        length += len(rest)
        if rest and length <= max_line_bytes:
            pending.append(rest)
            held += len(rest)
        elif held > 0 and length > max_line_bytes:
            pending, held = [], 0
    if length:
        yield Line(number, offset, b"".join(pending) if length <= max_line_bytes else None, length)


def _raw_blocks(stream: IO[bytes], file: InputFile, size: int) -> Iterator[bytes]:
    try:
        while block := stream.read(size):
            yield block
    except Exception as error:  # see `refuse_unreachable`
        refuse_unreachable(file.path, error)


def _inflate(begin: bytes, stream: IO[bytes], file: InputFile, new: Callable[[], Decompressor]) -> Iterator[bytes]:
    """Decompress one member or frame after another; `begin` has been read from the stream already."""
    current: Decompressor | None = None
    consumed = 0
    for block in chain((begin,), _raw_blocks(stream, file, COMPRESSED_READ_BYTES)):
        data = block
        while data:
            current = current or new()
            try:
                plain = current.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise InputError(
                    f"{file.path} is damaged near compressed byte {consumed + len(block) - len(data)}: {error}. Fetch or "
                    "compress it again."
                ) from error
            if plain:
                yield plain
            data = current.unused_data if current.eof else b""
            if current.eof:
                current = None
                data = data.lstrip(b"\0")
        consumed += len(block)
    if current is not None:
        raise InputError(
            f"{file.path} is cut short: its compressed data ends after {counted(consumed, 'byte')} without an end mark, so "
            "rows are missing. Fetch or compress it again."
        )
