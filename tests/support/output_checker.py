"""Looks at an output folder with plain pyarrow, json and hashlib: it shares no line with what wrote the folder.

What every sample must be follows from the scripted engine alone (`expected_tokens`), not from another run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from benchmarks.scripted_engine import QUICKSTART, Script, expected_tokens

KNOWN = {
    "data", "manifest.json", "commits.jsonl", "row_digests.parquet", "job.json", "summary.json", "_SUCCESS", "_lock", "_tmp",
    "_input", "_units",
}  # fmt: skip
STEPS = re.compile(r"steps-\d{5}\.parquet")
SCHEDULED = "num_cached_tokens"
"""The one column that depends on how a sample was scheduled."""


class Checker:
    """Holds the input; `check` compares a folder with it."""

    def __init__(self, questions: Sequence[str | None], n: int, max_tokens: int, script: Script) -> None:
        """A question that is None makes an error row."""
        tokenizer = Tokenizer.from_file(str(QUICKSTART / "tokenizer.json"))
        self.questions, self.n = questions, n
        self._expected: dict[tuple[int, int], list[int] | None] = {}
        for row, question in enumerate(questions):
            length = len(tokenizer.encode(question).ids) if question is not None else 0
            for sample in range(n):
                key = (row, sample)
                self._expected[key] = expected_tokens(script, row, sample, length, max_tokens) if length else None

    @property
    def samples(self) -> int:
        return len(self._expected)

    def check(self, out: Path) -> int:
        """Asserts that whatever is in the folder is whole, right and there once; how many samples that is."""
        seen: dict[tuple[int, int], Mapping[str, Any]] = {}
        for row in read(out):
            key = (row["row_index"], row["sample_index"])
            assert key in self._expected, f"{key} was never asked for"
            assert key not in seen, f"{key} is there twice"
            seen[key] = row
            self._check_row(row, self._expected[key])
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        assert {name for name in names if not STEPS.fullmatch(name)} <= KNOWN
        if (out / "_SUCCESS").exists():
            # It may be that of a smaller run before, which nothing was added to yet.
            assert check_success(out) == len(seen), "_SUCCESS stands, but samples lack"
        return len(seen)

    def check_complete(self, out: Path, reference: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Check the same, and that nothing is missing; identical to the table of an undisturbed run, if given."""
        found = self.check(out)
        assert found == self.samples, f"{self.samples - found} samples are lost"
        assert (out / "_SUCCESS").exists() and not (out / "_tmp").exists() and not (out / "_input").exists()
        assert reference is None or table(out) == reference, "the table is not that of an undisturbed run"

    def _check_row(self, row: Mapping[str, Any], expected: list[int] | None) -> None:
        if expected is None:
            assert (row["status"], row["error_code"], row["token_ids"]) == ("error", "missing_field", None)
            return
        assert (row["status"], row["error_code"]) == ("ok", None)
        assert row["token_ids"] == expected and row["num_output_tokens"] == len(expected)
        assert row["question"] == self.questions[row["row_index"]] and row["text"] is not None


def data_files(out: Path) -> list[Path]:
    """What readers of Parquet folders see; a start that dies may leave the file that it tries the disk with."""
    names = sorted(os.listdir(out / "data")) if (out / "data").exists() else []
    assert all(name.startswith(".probe") for name in names if name[:1] in "._")
    return [out / "data" / name for name in names if name[:1] not in "._"]


def read(out: Path) -> list[dict[str, Any]]:
    """Every row of every file, each page held against its checksum."""
    rows: list[dict[str, Any]] = []
    for path in data_files(out):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                rows += file.read().to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise AssertionError(f"{path} is torn: {error}") from error
    return rows


def table(out: Path) -> list[dict[str, Any]]:
    """The rows by their keys."""
    rows = sorted(read(out), key=lambda row: (row["row_index"], row["sample_index"]))
    return [{name: value for name, value in row.items() if name != SCHEDULED} for row in rows]


def check_success(out: Path) -> int:
    """`_SUCCESS` names exactly the files there are, with their digests and counts; how many samples it speaks of."""
    document = json.loads((out / "_SUCCESS").read_text())
    files = {file["name"]: file for file in document["files"]}
    assert set(files) == {f"data/{path.name}" for path in data_files(out)}
    for name, file in files.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == file["sha256"]
        assert pq.read_metadata(out / name).num_rows == file["rows"] == file["ok"] + file["errors"]
    assert document["samples"] == document["ok"] + document["errors"] == sum(file["rows"] for file in files.values())
    return document["samples"]
