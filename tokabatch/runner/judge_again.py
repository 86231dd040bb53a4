"""Verdicts for samples that are committed: for `tokabatch score`, and for those that a stopped run left unjudged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.output.schema import SCORE_FIELDS, input_names, output_schema, own_names, verdict_names
from tokabatch.output.shards import count_ok, open_shard, read_groups
from tokabatch.output.unwritable import CANNOT_BE_WRITTEN
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.scoring.judge import Verdict, verdict_columns
from tokabatch.scoring.pool import JudgePool, Ticket
from tokabatch.storage.listing import ListedFile

Which = Literal["all", "missing", "unjudged"]
"""Which samples of a shard are judged: all, those without a verdict, or of these the ones that a stopped run left unjudged."""
NO_TEXT = "its text could not be written, so that it cannot be judged"
SUBMITTED_SAMPLES = 4096
LOOK_SECONDS = 0.2


def judge_again(
    file: ListedFile,
    own: Sequence[pa.Field[Any]],
    pool: JudgePool,
    on_judged: Callable[[int], object],
    rows_of: Callable[[pa.Table], Sequence[Mapping[str, Any]]],
    which: Which = "all",
) -> Iterator[tuple[pa.Table, int]]:
    """Yield the samples of a shard in pieces, with new verdicts for `which` of them, and how many were judged; the others keep
    theirs. `rows_of` returns the input's row of each sample of a table. `on_judged` is called regularly with the number of
    samples that have got their verdict since, and may raise, or close the pool: the samples left are NOT_JUDGED then."""
    for table in read_groups(file, None):
        before, ours = verdict_names(table.schema), own_names(table.schema)
        inputs = list(input_names(table.schema))
        again, texts = _chosen(table, which)
        verdicts: list[Verdict | None] = [Verdict.none(NO_TEXT) if wanted else None for wanted in again]
        places = [place for place, wanted in enumerate(again) if wanted and texts[place] is not None]
        described = table.select(["id", "row_index", *inputs])
        for begin in range(0, len(places), SUBMITTED_SAMPLES):
            part = places[begin : begin + SUBMITTED_SAMPLES]
            tickets = pool.submit([texts[place] or "" for place in part], rows_of(described.take(pa.array(part))))
            known = 0
            while not pool.wait(tickets, LOOK_SECONDS):
                before_now, known = known, _num_judged(tickets)
                on_judged(known - before_now)
            on_judged(_num_judged(tickets) - known)
            for place, ticket in zip(part, tickets, strict=True):
                verdicts[place] = ticket.verdict
        on_judged(sum(again) - len(places))
        kept = pa.schema([table.schema.field(name) for name in inputs], table.schema.metadata)
        schema = output_schema(kept, verdicts=own, reasoning="answer_text" in ours, scored=SCORE_FIELDS[0].name in ours)
        columns = {name: table[name] for name in ours if name not in before}
        values = verdict_columns(verdicts, [field.name for field in own])
        made = {field.name: pa.array(values[field.name], field.type) for field in own}
        if which != "all":
            mask = pa.array(again)
            earlier = {name: table[name].combine_chunks() for name in made}
            made = {name: pc.call_function("if_else", [mask, value, earlier[name]]) for name, value in made.items()}
        columns |= made
        # The input's columns come last, in their order; one may have a new name, if the judge now has a column of its name.
        arrays = [columns[field.name] for field in list(schema)[: len(schema) - len(inputs)]]
        yield (
            pa.Table.from_arrays([*arrays, *(table[name] for name in inputs)], schema=schema),
            sum(verdict is not None and verdict.error not in (NOT_JUDGED, NO_TEXT) for verdict in verdicts),
        )


def _num_judged(tickets: Sequence[Ticket]) -> int:
    return sum(ticket.verdict is not None and ticket.verdict.error != NOT_JUDGED for ticket in tickets)


def _chosen(table: pa.Table, which: Which) -> tuple[list[bool], list[str | None]]:
    """Return whether each sample is to be judged, and its text that is judged, None if it was not written."""
    ours, reasons = own_names(table.schema), pa.nulls(table.num_rows)
    if "verify_error" in verdict_names(table.schema):
        reasons = table["verify_error"]
    judged, names = "answer_text" if "answer_text" in ours else "text", ("status", "error_code", "text")
    status, code, whole, answers, why = (each.to_pylist() for each in (*map(table.column, (*names, judged)), reasons))
    texts = [None if text is None else answer or "" for text, answer in zip(whole, answers, strict=True)]
    again = [
        # One that could not be written whole was judged all the same. Without its text it keeps what this judge has said of it.
        (state == "ok" or fault == CANNOT_BE_WRITTEN)
        and _is_of(which, reason)
        and (text is not None or which == "all" or reason == NOT_JUDGED)
        for state, fault, text, reason in zip(status, code, texts, why, strict=True)
    ]
    return again, texts


def num_lacking(file: ListedFile, which: Which) -> int:
    """Return the number of a shard's samples that `judge_again` judges: all, those without a verdict ("missing"), or those that
    a stopped run left unjudged. Texts are read only where one may be missing: of a sample that could not be written."""
    if which == "all":
        tables = read_groups(file, ("status", "error_code"))
        return sum(count_ok(each) + each["error_code"].to_pylist().count(CANNOT_BE_WRITTEN) for each in tables)
    with open_shard(file) as parquet:
        if "verify_error" not in verdict_names(parquet.schema_arrow):
            return 0
        table: pa.Table = parquet.read(["status", "error_code", "verify_error"])
    status, code, reasons = (table[name].to_pylist() for name in ("status", "error_code", "verify_error"))
    wanted = [_is_of(which, reason) for reason in reasons]
    if not any(wanted) or CANNOT_BE_WRITTEN not in code:
        return sum(wants and state == "ok" for wants, state in zip(wanted, status, strict=True))
    columns = ("status", "error_code", "text", "answer_text", "verify_error")
    return sum(sum(_chosen(each, which)[0]) for each in read_groups(file, columns))


def _is_of(which: Which, reason: str | None) -> bool:
    """Return whether a sample is one of those to judge, by its `verify_error`."""
    return which == "all" or (reason is not None if which == "missing" else reason == NOT_JUDGED)
