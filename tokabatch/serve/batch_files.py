"""The files of a batch: the requests in its input, and its files of results and errors, written from its run.

Everything here reads or writes whole files, and is for a thread beside the event loop.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.batch.results import renamed, write_results
from tokabatch.errors import UsageError
from tokabatch.input.batch_files import BODY, CUSTOM_ID, PROMPT_INDEX, URL, open_rows
from tokabatch.input.rows import Row
from tokabatch.job import Job
from tokabatch.output.export import committed_shards
from tokabatch.output.folder import OutputFolder
from tokabatch.serve.settings import ServiceConfig
from tokabatch.serve.stored_files import StoredFiles

SHOWN_FAULTS = 20
Batch = dict[str, Any]
"""Its record, as the API shows it."""


@dataclass(slots=True)
class InputLines:
    """The requests of a batch file: the one that each row is of, which of them are faulty, and what is wrong with the file."""

    request_of_row: Int64
    faulty: list[bool] = field(default_factory=list[bool])
    errors: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class BatchFiles:
    """Of all batches of a server; a method is given the record of one."""

    def __init__(self, files: StoredFiles, config: ServiceConfig) -> None:
        self._files = files
        self._config = config

    def job(self, batch: Batch, results: str) -> Job:
        """The run that answers its requests, with the output folder `results`."""
        return self._config.job(str(self._files.path(batch["input_file_id"])), results, "openai")

    def look_through(self, batch: Batch) -> InputLines:
        """What is wrong with a line alone makes it an error; a file that is not for here is refused."""
        lines, requests = InputLines(np.zeros(0, np.int64)), list[int]()
        try:
            for row in self._rows(batch):
                columns = row.columns or {}
                if not columns.get(PROMPT_INDEX):
                    lines.faulty.append(row.error is not None)
                    if row.error is None:
                        self._look_at(batch, columns, len(lines.faulty), lines.errors)
                requests.append(len(lines.faulty) - 1)
        except UsageError as error:
            lines.errors.append(
                {"code": "invalid_file", "message": self.client_message(batch, error), "param": None, "line": None}
            )
        if not requests and not lines.errors:
            lines.errors.append({"code": "empty_file", "message": "the file holds no request", "param": None, "line": None})
        lines.request_of_row = np.array(requests, np.int64)
        return lines

    def _rows(self, batch: Batch) -> Iterator[Row]:
        """Of its input. Raises UsageError."""
        return (row for rows in open_rows(self.job(batch, "-").input).batches() for row in rows.rows)

    def _look_at(self, batch: Batch, columns: Any, line: int, errors: list[dict[str, Any]]) -> None:
        if len(errors) >= SHOWN_FAULTS:
            return
        if columns[URL] != batch["endpoint"]:
            message = f"the url is {columns[URL]!r}, the batch's endpoint {batch['endpoint']!r}"
            errors.append({"code": "mismatched_url", "message": message, "param": "url", "line": line})
        elif (model := json.loads(columns[BODY]).get("model")) not in (None, self._config.name):
            message = f"the model {model!r} is not served here; this server has {self._config.name!r}"
            errors.append({"code": "model_not_found", "message": message, "param": "body.model", "line": line})

    def _input_name(self, batch: Batch) -> str:
        """What the client calls the file of requests."""
        stored = self._files.get(batch["input_file_id"])
        return (stored and stored.filename) or batch["input_file_id"]

    def client_message(self, batch: Batch, error: UsageError) -> str:
        """The error, with the client's own name of the file, not where that lies here."""
        return renamed(str(error), str(self._files.path(batch["input_file_id"])), self._input_name(batch))

    def write_results(self, batch: Batch, code: str | None) -> tuple[str | None, str | None, dict[str, int]]:
        """Write what there is of the run. With a `code`, requests that have no result get an error of that code. Return the ids
        of the files of results and of errors, None for one that would be empty, and what is new of the request counts."""
        name = batch["id"]
        results, errors = self._files.path(name, ".results.jsonl"), self._files.path(name, ".errors.jsonl")
        folder, counts = OutputFolder(self._files.path(name, ".run")), {"completed": 0, "failed": 0}
        for file in (results, errors):
            file.write_bytes(b"")
        if folder.path.exists() and committed_shards(folder):
            called = self._input_name(batch)
            written = write_results(folder.path, results, errors, model=self._config.name, requests=called)
            counts = {"completed": written.results, "failed": written.errors}
        if code is not None:
            counts["failed"] += self._write_unanswered(batch, code, results, errors)
            counts["total"] = sum(counts.values())
        kept: list[str | None] = []
        for kind, file in (("output", results), ("error", errors)):
            number = f"file-{_digest(name, kind)}"
            kept.append(number if file.stat().st_size else None)
            if kept[-1] is not None:
                self._files.put(number, f"{name}_{kind}.jsonl", "batch_output", file)
            else:
                file.unlink()
        return kept[0], kept[1], counts

    def _write_unanswered(self, batch: Batch, code: str, results: Path, errors: Path) -> int:
        """Add an error for each request that is in neither file; return their number."""
        # Faulty lines may have no custom_id: as many of them are there as have their lines.
        there, count = Counter(_custom_ids(results, errors)), 0
        with errors.open("a") as file, suppress(UsageError):
            for row in self._rows(batch):
                columns = row.columns or {}
                if columns.get(PROMPT_INDEX):
                    continue
                named = columns.get(CUSTOM_ID)
                if there[named]:
                    there[named] -= 1
                    continue
                error = {"code": code, "message": "this request was not answered before the batch ended"}
                request = f"batch_req_{_digest(batch['id'], str(row.index))}"
                file.write(json.dumps({"id": request, CUSTOM_ID: named, "response": None, "error": error}) + "\n")
                count += 1
        return count


def _custom_ids(*files: Path) -> Iterator[str | None]:
    for path in files:
        with path.open("rb") as file:
            yield from (json.loads(line)[CUSTOM_ID] for line in file)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
