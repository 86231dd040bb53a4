"""OpenAI's batch files as input: a line is a request, and each of its prompts a row with the settings of the request.

A row has the columns `id` (the custom_id; `custom_id[1]` and so on for the further prompts of a list), `custom_id`, `url`,
`prompt_index` and, in the first row of a request, `body`, the request's JSON text; other keys of a line are columns, too. A
line that is not a valid request becomes an error row with as many of these columns as the line has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokabatch.errors import InputError, JobError, RowError
from tokabatch.input.readers import is_of_files, open_path, open_reader
from tokabatch.input.readers.jsonl import JsonLinesReader, LineRow
from tokabatch.input.rows import Reader
from tokabatch.job import InputConfig, Job
from tokabatch.number_text import first_counted
from tokabatch.openai.batch_lines import is_batch_line, read_line
from tokabatch.openai.errors import ApiError

BAD_REQUEST = "bad_request"
"""The error code of a line of valid JSON that is not a valid request."""
_LIKE_FURTHER = re.compile(r"\[\d+\]\Z")
ID, CUSTOM_ID, URL, PROMPT_INDEX, BODY = COLUMNS = ("id", "custom_id", "url", "prompt_index", "body")


def settle_format(job: Job) -> Job:
    """Return the job with `input.format: auto` decided. The format of batch files sets further keys that the job leaves open:
    rows are identified by custom_id, completions prompts are taken as they are, and a request without max_tokens may use what
    its prompt leaves of the model's context. Raises InputError if the job gives this format and the input has another, and
    JobError if such a job scores texts."""
    chosen = job.input.format
    if chosen != "rows" and not is_of_files(job.input, "jsonl"):
        if chosen == "openai":
            raise InputError(
                f"input.format is openai, but input.path {job.input.path!r} is not a .jsonl file; name the batch file"
            )
        chosen = "rows"
    if chosen != "rows":
        batch = next(open_path(job.input.path).batches(), None)
        lines = [row.columns for row in (batch.rows if batch else ()) if row.columns is not None]
        if chosen == "openai" and lines and not any(map(is_batch_line, lines)):
            raise InputError(
                f"input.path {job.input.path!r} is not a batch file: none of its {first_counted(len(lines), 'line')} has "
                "custom_id, a url such as /v1/chat/completions, and body. Rows of another kind are completed by "
                "`tokabatch run` (input.format: rows)"
            )
        chosen = "openai" if chosen == "openai" or (lines and is_batch_line(lines[0])) else "rows"
    if chosen == "rows":
        return job.model_copy(update={"input": job.input.model_copy(update={"format": "rows"})})
    if job.mode == "score":
        raise JobError(
            f"mode is score, but input.path {job.input.path!r} is a batch file, whose requests are to be completed; remove "
            "mode, or write input.format: rows"
        )
    settled = {"format": "openai", "id_column": job.input.id_column or ID}
    chat = False if job.prompt.chat == "auto" else job.prompt.chat
    generation = job.generation
    if "max_tokens" not in generation.model_fields_set:
        generation = generation.model_copy(update={"max_tokens": "context"})
    return job.model_copy(
        update={
            "input": job.input.model_copy(update=settled),
            "prompt": job.prompt.model_copy(update={"chat": chat}),
            "generation": generation,
        }
    )


def open_rows(config: InputConfig) -> Reader:
    """Return the reader of a job's input; its format must be settled."""
    reader = open_reader(config)
    return replace(reader, split=split_line) if config.format == "openai" and isinstance(reader, JsonLinesReader) else reader


def split_line(line: Mapping[str, Any], place: str) -> list[LineRow]:
    """Return the rows of a line's object; `place` is named in its errors."""
    read = read_line(line)
    known = {name: value for name, value in line.items() if name not in ("method", *COLUMNS)}
    body = line.get(BODY)
    known |= {CUSTOM_ID: read.custom_id, URL: read.url, BODY: None if body is None else json.dumps(body, ensure_ascii=False)}
    if isinstance(read.request, ApiError):
        whose = f"custom_id {read.custom_id!r}: " if read.custom_id is not None else ""
        error = RowError(BAD_REQUEST, f"{place}: {whose}{read.request.message}")
        return [_row(known | {ID: read.custom_id, PROMPT_INDEX: 0}, {}, error)]
    rows: list[LineRow] = []
    for number, columns in enumerate(read.request.rows()):
        # A custom_id may itself end like the id of a further prompt, but those never have number 0.
        bare = number == 0 and not _LIKE_FURTHER.search(read.custom_id or "")
        own = {ID: read.custom_id if bare else f"{read.custom_id}[{number}]", PROMPT_INDEX: number}
        rows.append(_row(known | own | ({} if number == 0 else {BODY: None}), columns))
    return rows


def _row(kept: Mapping[str, Any], columns: Mapping[str, Any], error: RowError | None = None) -> LineRow:
    return LineRow(kept, json.dumps(kept, ensure_ascii=False).encode(), error, columns)
