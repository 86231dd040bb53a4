"""The whole input, tokenised once and kept on disk: what planning, scheduling and the output read.

`ingest` is a single pass over the rows in bounded memory; everything per row lives in files of the given folder, which the
caller owns and removes. Independent of the schedule and of the output format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.errors import InputError, RowError
from tokabatch.input.batch_files import PROMPT_INDEX, open_rows, settle_format
from tokabatch.input.files.arrow_rows import python_rows
from tokabatch.input.prompts.builder import Limits, Prompt, PromptBuilder
from tokabatch.input.prompts.columns import check_columns, check_first_rows
from tokabatch.input.prompts.notes import describe_shots
from tokabatch.input.readers import describe_unused
from tokabatch.input.rows import Reader, RowBatch, RowPlaces, no_rows
from tokabatch.input.store.columns import Columns, ColumnSpool, open_column_spool, restore_columns
from tokabatch.input.store.disk_arrays import ArraySpool, Texts, open_array
from tokabatch.input.store.identity import IdSpool, read_ids
from tokabatch.input.store.json_types import parse_json_texts
from tokabatch.input.store.row_digests import DigestSpool, RowDigests
from tokabatch.job import GenerationConfig, Job
from tokabatch.scheduling.contracts import Continuations, SamplingParams
from tokabatch.storage.write_errors import spooling

if TYPE_CHECKING:
    from tokabatch.input.tokenizer.tokenizer import Tokenizer

_TOKENS, _START, _LENGTH, _PARAMS = "tokens.bin", "start.bin", "length.bin", "params.bin"
_COLUMNS, _IDS = "columns", "ids.bin"
_SETTINGS = tuple(field.name for field in fields(SamplingParams))
_GIVEN = ("continuation_first.bin", "continuation_start.bin", "continuation_tokens.bin")
_SCORED_WHOLE = "scored_whole.bin"
MAX_NAMES = 10_000
MAX_MESSAGE = 500
"""Maximum length of an error's message, in characters: a bad row may be large, and there may be many."""


@dataclass(frozen=True)
class InputStore:
    """Row r's prompt is `tokens[start[r] : start[r] + length[r]]`, sampled as `sampling[params[r]]`; a row in `errors` has
    length 0. Arrays are memory-mapped and read-only."""

    num_rows: int
    tokens: Int32
    start: Int64
    length: Int32
    params: Int32
    sampling: tuple[SamplingParams, ...]
    errors: dict[int, RowError]
    column_schema: pa.Schema
    """The input columns that the output carries (`output.columns`)."""
    chat: bool
    """Whether text prompts go through the chat template."""
    notes: tuple[str, ...]
    """Notes on prompts that may not be what their author intended."""
    hidden_rows: int
    """Number of prompts in which a special token spelled by the row was encoded as plain text."""
    digests: RowDigests
    """Digests of the rows and of their prompts."""
    places: RowPlaces
    continuations: Continuations | None
    """The texts to score after the prompts; None in mode generate."""
    scored_whole: Bool
    """Rows whose whole text is scored, after its first token: shape [num_rows] in mode score, else [0]."""
    _columns: Columns
    _ids: Texts | None

    def prompt(self, row: int) -> Int32:
        """Return the token ids of one row's prompt, shape [length]."""
        start = int(self.start[row])
        return self.tokens[start : start + int(self.length[row])]

    @property
    def first_prompt_row(self) -> int | None:
        """The first row that has a prompt; None if no row has one."""
        found = np.flatnonzero(self.length[: len(self.errors) + 1])
        return int(found[0]) if len(found) else None

    def columns(self, row_indices: Int64, names: Sequence[str] | None = None) -> pa.Table:
        """Return input columns of any rows in any order, repeats included; `names` overrides `column_schema`. Rows that could
        not be read are null. An Arrow table without columns has no rows, whatever `row_indices` holds."""
        rows, back = np.unique(np.asarray(row_indices, dtype=np.int64), return_inverse=True)
        table = self._columns.take(rows, self.column_schema.names if names is None else names)
        in_order = not table.num_columns or np.array_equal(back, np.arange(len(rows)))
        return table if in_order else table.take(pa.array(back))

    def input_rows(self, row_indices: Int64) -> list[dict[str, Any]]:
        """Return any rows with all columns that are kept, converted as by `python_rows`, JSON text as the value that it stands
        for; repeats of a row are one object."""
        rows, back = np.unique(np.asarray(row_indices, dtype=np.int64), return_inverse=True)
        values = python_rows(self._columns.take(rows, self._columns.schema.names))
        parse_json_texts(values, self._columns.schema)
        return [values[place] if values else {} for place in back.tolist()]

    def row_bytes(self, row_indices: Int64) -> Int64:
        """Return an upper bound of the memory that the columns of each of these rows take, shape [rows]."""
        return self._columns.row_bytes(np.asarray(row_indices, dtype=np.int64))

    def ids(self, row_indices: Int64) -> pa.Array[Any]:
        """Return the rows' ids as strings: from `input.id_column`, else the row number; null for a row without one."""
        return read_ids(self._ids, np.asarray(row_indices, dtype=np.int64))

    def close(self) -> None:
        """Release the files; the folder stays the caller's."""
        self._columns.close()

    def state(self) -> dict[str, Any]:
        """Return what `restored` needs besides the files, as plain JSON values."""
        return {
            "num_rows": self.num_rows,
            "kinds": len(self.sampling),
            "settings": {name: _shared(getattr(params, name) for params in self.sampling) for name in _SETTINGS},
            "errors": [[row, error.code, error.message] for row, error in self.errors.items()],
            "carried": self.column_schema.names,
            "chat": self.chat,
            "notes": self.notes,
            "hidden_rows": self.hidden_rows,
            "columns": self._columns.state(),
            "ids": self._ids is not None,
            "scores": self.continuations is not None,
            "begins": self.places.begins,
        }

    @classmethod
    def restored(cls, folder: Path, state: Mapping[str, Any]) -> InputStore:
        """Reopen the finished store in `folder` from its `state`."""
        columns = restore_columns(folder / _COLUMNS, state["columns"])
        settings = [_unshared(state["settings"][name], state["kinds"]) for name in _SETTINGS]
        first, start, tokens = (folder / name for name in _GIVEN)
        return cls(
            num_rows=state["num_rows"],
            tokens=open_array(folder / _TOKENS, np.int32),
            start=open_array(folder / _START, np.int64),
            length=open_array(folder / _LENGTH, np.int32),
            params=open_array(folder / _PARAMS, np.int32),
            sampling=tuple(SamplingParams(*values) for values in zip(*settings, strict=True)),
            errors={row: RowError(code, message) for row, code, message in state["errors"]},
            column_schema=_selected(columns.schema, state["carried"]),
            chat=state["chat"],
            notes=tuple(state["notes"]),
            hidden_rows=state["hidden_rows"],
            digests=RowDigests.open(folder),
            places=RowPlaces([(row, name, line) for row, name, line in state["begins"]]),
            continuations=Continuations(open_array(first, np.int64), open_array(start, np.int64), open_array(tokens, np.int32))
            if state["scores"]
            else None,
            scored_whole=open_array(folder / _SCORED_WHOLE, np.bool_),
            _columns=columns,
            _ids=Texts.open(folder / _IDS) if state["ids"] else None,
        )


def ingest(
    job: Job,
    tokenizer: Tokenizer,
    folder: Path,
    context_length: int,
    *,
    generation: GenerationConfig | None = None,
    vocab_size: int | None = None,
    on_rows: Callable[[int, int], None] | None = None,
    clock: str = "",
) -> InputStore:
    """Read, render and tokenise the job's input into `folder`, which must exist and be empty.

    `generation` is the job's with the model's defaults filled in; `vocab_size` the number of embeddings (default: the
    tokenizer's). `on_rows` is called after each batch with the numbers of rows and error rows so far. `clock` is the time that
    templates see, ISO 8601 (default: now). Raises InputError or JobError if the input as a whole cannot be used, OutputError if
    the folder cannot be written; a bad row becomes an entry in `errors`.
    """
    limits = Limits(context_length, vocab_size or tokenizer.vocab_size)
    job = settle_format(job)
    reader, batch_file = open_rows(job.input), job.input.format == "openai"
    typed, now = reader.schema is not None, datetime.fromisoformat(clock).replace(tzinfo=None) if clock else datetime.now()
    given = generation or job.generation
    # A client's plain prompt holds its whole conversation, special tokens included, unless the job says otherwise.
    trusted = batch_file and "special_tokens" not in job.prompt.model_fields_set
    builder = PromptBuilder(
        job.prompt,
        given,
        tokenizer,
        limits,
        typed=typed,
        now=now,
        scores=job.mode == "score",
        trusts_plain_texts=trusted,
        of_requests=batch_file,
    )
    if reader.schema is not None:
        check_columns(job, builder.own_columns, reader.schema.names)
    with spooling(folder):
        spools = _Spools(job, folder, reader)
    left = job.input.limit
    needed = builder.columns | {name for name in (job.input.id_column,) if name}
    for batch in reader.batches(needed):
        kept, left = _first(batch, left, whole_requests=batch_file)
        prompts = builder.build(kept.rows)
        with spooling(folder):
            spools.append(kept, prompts)
        if spools.any_parsed and spools.num_rows == len(kept.rows) and left != 0:
            check_first_rows(builder.own_columns, spools.names, spools.num_rows)
        if on_rows is not None:
            on_rows(spools.num_rows, len(spools.errors))
        if left == 0 and (not batch_file or len(kept.rows) < len(batch.rows)):
            break
    if spools.num_rows == 0:
        raise no_rows(reader.name)
    if spools.any_parsed:
        check_columns(job, builder.own_columns, spools.names)
    with spooling(folder):
        return spools.finish(job, builder)


def _first(batch: RowBatch, left: int | None, *, whole_requests: bool) -> tuple[RowBatch, int | None]:
    """Cut a batch at `input.limit`; return it with what is left of the limit: rows or, in batch files, requests with all of
    their rows, the last of which may be in the next batch."""
    if left is None:
        return batch, None
    if not whole_requests:
        kept = batch.head(left)
        return kept, left - len(kept.rows)
    begins = [place for place, row in enumerate(batch.rows) if not (row.columns or {}).get(PROMPT_INDEX)]
    return batch.head(begins[left] if left < len(begins) else len(batch.rows)), left - min(left, len(begins))


class _Spools:
    """Everything that grows while the rows stream by."""

    def __init__(self, job: Job, folder: Path, reader: Reader) -> None:
        carried = job.output.columns
        self._tokens = ArraySpool(folder / _TOKENS, np.int32)
        self._start = ArraySpool(folder / _START, np.int64)
        self._length = ArraySpool(folder / _LENGTH, np.int32)
        self._params = ArraySpool(folder / _PARAMS, np.int32)
        self._columns: ColumnSpool = open_column_spool(
            folder / _COLUMNS,
            reader.schema,
            () if carried == "all" else carried,
            # A judge sees the whole row.
            others=carried == "all" or job.verify is not None,
        )
        of_requests = job.input.format == "openai"
        key, schema = job.input.id_column, reader.schema
        kind = schema.field(key).type if key is not None and schema is not None and key in schema.names else None
        self._ids = IdSpool(folder / _IDS, key, of_requests, kind) if key else None
        self._sampling: dict[SamplingParams, int] = {}
        self.errors: dict[int, RowError] = {}
        self.names: dict[str, None] = dict.fromkeys(reader.schema.names) if reader.schema is not None else {}
        self.num_rows = 0
        self.any_parsed = False
        self._begins: list[tuple[int, str, int]] = []
        self._digests = DigestSpool(folder)
        self._given = _GivenSpool(folder) if job.mode == "score" else None
        self._scored_whole = ArraySpool(folder / _SCORED_WHOLE, np.bool_)

    def append(self, batch: RowBatch, prompts: Sequence[Prompt | RowError]) -> None:
        faults = self._ids.append(batch.rows) if self._ids else {}
        results = [faults.get(row.index, prompt) for row, prompt in zip(batch.rows, prompts, strict=True)]
        self._begins.extend(batch.begins)
        places = RowPlaces(self._begins)
        for row, each in zip(batch.rows, results, strict=True):
            if isinstance(each, RowError):
                # An error from the reader names its line already.
                line = places.line(row.index) if row.error is None else ""
                self.errors[row.index] = _shortened(RowError(each.code, f"{line}: {each.message}") if line else each)
        good = [each if isinstance(each, Prompt) else None for each in results]
        lengths = [0 if each is None else len(each.token_ids) for each in good]
        self._start.append(self._tokens.length + np.cumsum(lengths, dtype=np.int64) - np.asarray(lengths, dtype=np.int64))
        self._length.append(lengths)
        known = self._sampling
        self._params.append([0 if each is None else known.setdefault(each.params, len(known)) for each in good])
        if tokens := [each.token_ids for each in good if each is not None]:
            self._tokens.append(np.concatenate(tokens))
        self._columns.append(batch)
        self._digests.append(
            batch, [None if each is None else np.concatenate((each.token_ids, *each.continuations)) for each in good]
        )
        if self._given is not None:
            self._given.append([() if each is None else each.continuations for each in good])
            self._scored_whole.append([each is not None and each.scored_whole for each in good])
        for row in batch.rows:
            if row.columns is not None:
                self.any_parsed |= row.error is None
                self.names.update(dict.fromkeys((*row.columns, *row.prompt_columns)))
        if len(self.names) > MAX_NAMES:
            raise InputError(f"the rows have more than {MAX_NAMES} different keys; nest those that vary in one object")
        self.num_rows += len(batch.rows)

    def finish(self, job: Job, builder: PromptBuilder) -> InputStore:
        places = RowPlaces(tuple(self._begins))
        ids = self._ids.finish(places) if self._ids else None
        columns = self._columns.finish()
        carried = job.output.columns
        # Only those in `output.columns`; the others are kept for a judge.
        names = [name for name in columns.schema.names if carried == "all" or name in carried]
        return InputStore(
            num_rows=self.num_rows,
            tokens=self._tokens.finish(),
            start=self._start.finish(),
            length=self._length.finish(),
            params=self._params.finish(),
            sampling=tuple(self._sampling),
            errors=self.errors,
            column_schema=_selected(columns.schema, names),
            chat=builder.chat,
            notes=(
                *builder.describe(self.names, self.num_rows, places),
                *(self._ids.describe(places) if self._ids else ()),
                *describe_shots(job),
                *describe_unused(job.input),
            ),
            hidden_rows=builder.hidden_rows,
            digests=self._digests.finish(),
            places=places,
            continuations=None if self._given is None else self._given.finish(),
            scored_whole=self._scored_whole.finish(),
            _columns=columns,
            _ids=ids,
        )


def _shared(values: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """Return the distinct values, and the index of each place's value; no indices if there is only one value."""
    number: dict[Any, int] = {}
    places = [number.setdefault(value, len(number)) for value in values]
    return list(number), places if len(number) > 1 else []


def _unshared(column: Sequence[list[Any]], count: int) -> list[Any]:
    """Undo `_shared` for `count` values after a round trip through JSON, which turns tuples into lists."""
    values, places = column
    given = [_tuples(value) for value in values]
    return [given[place] for place in places or [0] * count]


class _GivenSpool:
    """The texts to score after the prompts, row after row."""

    def __init__(self, folder: Path) -> None:
        first, start, tokens = (folder / name for name in _GIVEN)
        self._first = ArraySpool(first, np.int64)
        self._start = ArraySpool(start, np.int64)
        self._tokens = ArraySpool(tokens, np.int32)
        self._start.append([0])

    def append(self, rows: Sequence[Sequence[Int32]]) -> None:
        """Append the texts of some rows."""
        counts, texts = np.array([len(texts) for texts in rows], np.int64), [text for texts in rows for text in texts]
        self._first.append(self._start.length - 1 + np.cumsum(counts) - counts)
        self._start.append(self._tokens.length + np.cumsum([len(text) for text in texts], dtype=np.int64))
        self._tokens.append(np.concatenate((np.zeros(0, np.int32), *texts)))

    def finish(self) -> Continuations:
        return Continuations(self._first.finish(), self._start.finish(), self._tokens.finish())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in cast("list[Any]", value)) if isinstance(value, list) else value


def _selected(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names], schema.metadata)


def _shortened(error: RowError) -> RowError:
    if len(error.message) <= MAX_MESSAGE:
        return error
    return RowError(error.code, error.message[: MAX_MESSAGE - 1] + "…")
