"""Recognise a file's true format from its first bytes, and suggest what to do with a misnamed one.

One refusal takes the place of an error row for each line. Only beginnings that no JSON Lines or Parquet file has are listed.
"""

from __future__ import annotations

import re

from tokabatch.errors import InputError

HEAD_BYTES = 512
"""Number of leading bytes that are looked at."""
_TO_PARQUET = "convert it to Parquet or JSON Lines"
_TO_UTF_8 = "JSON Lines is UTF-8; convert it, for example with: iconv -f UTF-16 -t UTF-8 old.jsonl > new.jsonl"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"PAR1", "a Parquet file", "rename it to .parquet"),
    (rb"ARROW1|\xff\xff\xff\xff", "an Arrow file", f"{_TO_PARQUET}, for example with pandas.read_feather(...).to_parquet(...)"),
    (rb"Obj\x01", "an Avro file", _TO_PARQUET),
    (rb"ORC", "an ORC file", f"{_TO_PARQUET}, for example with pandas.read_orc(...).to_parquet(...)"),
    (rb"SQLite format 3\0", "an SQLite database", f"{_TO_PARQUET}, for example with pandas.read_sql(...).to_parquet(...)"),
    (rb"PK\x03\x04", "a ZIP archive", "unpack it with unzip (an Excel file: save it as CSV, and convert that)"),
    (rb".{257}ustar", "a tar archive", "unpack it with tar -x"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with 7z x"),
    (rb"BZh[1-9]", "compressed with bzip2", "decompress it with bunzip2"),
    (rb"\xfd7zXZ\0", "compressed with xz", "decompress it with unxz"),
    (rb"\x04\x22\x4d\x18", "compressed with lz4", "decompress it with lz4 -d"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull"),
    (
        rb"(?i)\s*<(!doctype html|html|\?xml)",
        "a web page or XML",
        "fetch the file itself, not a page about it",
    ),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _TO_UTF_8.replace("16", "32")),
    (rb"\xff\xfe|\xfe\xff|\s?\{\0|\0\{", "UTF-16 text", _TO_UTF_8),
    (
        rb"(\xef\xbb\xbf)?\s*\[\s*\{",
        "a JSON array, not one object a line",
        "write its items as lines, for example with: jq -c '.[]' old.jsonl > new.jsonl",
    ),
    (
        rb"(\xef\xbb\xbf)?\s*\{[ \t]*\r?\n\s*\"",
        "JSON over several lines, not one object a line",
        "write each object as a line, for example with: jq -c . old.jsonl > new.jsonl",
    ),
)
"""Patterns of a file's beginning, its format, and the remedy."""


def refuse_foreign(path: str, begin: bytes) -> None:
    """Raise InputError if a file that begins with these bytes is in a known format other than JSON Lines, gzip and zstd."""
    for pattern, kind, remedy in _KINDS:
        if re.match(pattern, begin[:HEAD_BYTES], re.DOTALL):
            raise InputError(f"{path} is {kind}, despite its name; {remedy}")
