"""A few samples of a run and its error rows, read from an output folder for people to look at.

For error rows, only the row groups that hold some are read, found by the statistics of `error_code`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.arrays import Bool, Float64, Int64
from tokabatch.input.files.arrow_rows import python_rows
from tokabatch.input.store.json_types import parse_json_texts
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.manifest import read_manifest
from tokabatch.output.schema import CORRECT, SCORE_FIELDS, VERDICT_FIELDS, input_names, own_names, row_names, verdict_names
from tokabatch.output.shards import open_shard, read_groups
from tokabatch.storage.listing import ListedFile, consistently
from tokabatch.storage.parquet_file import ParquetFile

Kind = Literal["first", "right", "wrong", "longest", "lowest", "highest"]
_KEYS = ("row_index", "sample_index", "status", "num_output_tokens")
_SCORE = VERDICT_FIELDS[1].name
_OF_A_ROW = 3
"""The candidates of a row for each kind: two of them may be shown as right and as wrong."""
_LONG_COLUMNS = frozenset(("token_ids", "logprobs"))


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """An input row without a completion: `samples` of its samples are errors with one `code`."""

    row_index: int
    id: str | None
    samples: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorRows:
    """Error rows, by code and then in the order of the input; `counts` is the total number of rows for each code."""

    rows: tuple[ErrorRow, ...]
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One sample with the columns of its row, under the input's names; `correct` is None if the job does not verify."""

    row_index: int
    sample_index: int
    text: str
    finish_reason: str
    num_output_tokens: int
    correct: bool | None
    columns: Mapping[str, Any]
    unjudged: str = ""
    """Why the job's judge gave no verdict, if it gave none."""
    logprob: float | None = None
    """Sum of the log-probabilities of its tokens, if they were recorded."""
    judged: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What its judge says besides the verdict, such as the answer that it has `extracted`, and its `verify_score` if that is
    neither 0 nor 1; empty without a verdict."""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a sample; `rank` orders the candidates of a kind."""

    rank: tuple[int, int, int]
    shard: ListedFile
    group: int
    offset: int


def error_rows(path: Path, per_code: int | None = None) -> ErrorRows:
    """Return the error rows in the output folder `path`, at most the first `per_code` of each code. Raises OutputError if the
    folder cannot be read, DamageError if it is damaged."""
    return consistently(lambda: _error_rows(_shards(OutputFolder(path)), per_code), path)


def excerpts(path: Path, count: int, *, whole: bool = False) -> dict[Kind, tuple[Excerpt, ...]]:
    """Return up to `count` samples of each kind, each from another row: the first right and wrong ones if the job verifies,
    else the first ones. They come from the first shard that has any; with `whole`, all shards are searched, also for the
    longest of the others.

    If the job scores given texts, a row is right or wrong by its likeliest continuation, which is shown; with `whole`, the
    texts of the lowest and the highest log-probability per token take the place of the longest, and of the first ones. No
    sample is returned twice."""

    def choose() -> dict[Kind, tuple[Excerpt, ...]]:
        folder = OutputFolder(path)
        manifest = read_manifest(folder)
        id_column = manifest and manifest.id_column
        shards = _shards(folder)
        # Verdicts of another judge count nowhere. Without `whole`, the footers of further shards are not read.
        good = (each for each in shards if manifest is None or manifest.is_judge_of(_metadata(each)))
        if shards and _scores_texts(shards[0]):
            return _scored(list(good if whole else islice(good, 1)), count, whole, id_column)
        return _excerpts(good, count, whole, id_column)

    return consistently(choose, path)


def finish_reasons(folder: OutputFolder) -> Counter[str]:
    """Return how many of the samples that are ok ended for each reason, such as `length`. Raises as `error_rows` does."""

    def count() -> Counter[str]:
        counts = Counter[str]()
        for shard in _shards(folder):
            for table in read_groups(shard, ("status", "finish_reason")):
                ok = table.filter(pc.call_function("equal", [table["status"], "ok"]))["finish_reason"].drop_null()
                for each in pc.call_function("value_counts", [ok]).to_pylist():
                    counts[each["values"]] += each["counts"]
        return counts

    return consistently(count, folder.path)


def _metadata(shard: ListedFile) -> Mapping[bytes, bytes] | None:
    with open_shard(shard) as file:
        return file.schema_arrow.metadata


def _scores_texts(shard: ListedFile) -> bool:
    with open_shard(shard) as file:
        return SCORE_FIELDS[0].name in own_names(file.schema_arrow)


def _scored(shards: Sequence[ListedFile], count: int, whole: bool, id_column: str | None) -> dict[Kind, tuple[Excerpt, ...]]:
    """Return what `excerpts` does; a few numbers of every text are held at once."""
    parts: list[tuple[Float64, ...]] = []
    places: list[tuple[int, int]] = []
    judged = False
    for number, shard in enumerate(shards):
        with open_shard(shard) as file:
            judged = CORRECT.name in own_names(file.schema_arrow)
            for group in range(file.num_row_groups):
                columns = [*_KEYS, "cumulative_logprob", *([CORRECT.name] if judged else ())]
                table = file.read_row_group(group, columns=columns)
                numbers = [table[name].cast(pa.float64()).fill_null(0.0).to_numpy() for name in columns if name != "status"]
                ok = np.asarray(table["status"].to_pylist(), dtype=object) == "ok"
                parts.append((*(each[ok] for each in numbers), np.flatnonzero(ok).astype(np.float64)))
                places += [(number, group)] * int(ok.sum())
    if not places:
        return {}
    row, sample, tokens, logprob, *correct, offset = map(np.concatenate, zip(*parts, strict=True))
    per_token = logprob / np.maximum(tokens, 1)
    free, shown = np.ones(len(row), np.bool_), dict[Kind, Int64]()

    def of_rows(key: Float64) -> Int64:
        """Return the text of each row with the smallest key, of those not shown yet, rows in the order of the input."""
        order = np.lexsort((sample, key, row))
        order = order[free[order]]
        return order[np.unique(row[order], return_index=True)[1]]

    def show(kind: Kind, texts: Int64) -> None:
        shown[kind] = texts[:count]
        free[shown[kind]] = False

    if judged:
        likeliest = of_rows(-logprob)
        right = correct[0][likeliest] > 0
        show("right", likeliest[right])
        show("wrong", likeliest[~right])
    elif not whole:
        show("first", of_rows(sample))
    if whole:
        keys: dict[Kind, Float64] = {"lowest": per_token, "highest": -per_token}
        for kind, key in keys.items():
            texts = of_rows(key)
            show(kind, texts[np.argsort(key[texts], kind="stable")])

    def read(at: int) -> Excerpt:
        shard, group = places[at]
        return _read(shards[shard], group, int(offset[at]), id_column)

    return {kind: tuple(map(read, texts.tolist())) for kind, texts in shown.items() if len(texts)}


def _shards(folder: OutputFolder) -> tuple[ListedFile, ...]:
    return recorded_shards(folder, read_manifest(folder))


def _error_rows(shards: Sequence[ListedFile], per_code: int | None) -> ErrorRows:
    numbers: dict[str, list[Int64]] = defaultdict(list)
    named: dict[str, dict[int, tuple[str | None, str]]] = defaultdict(dict)
    for table in _error_tables(shards):
        for code in pc.call_function("unique", [table["error_code"]]).to_pylist():
            of_code = table.filter(pc.call_function("equal", [table["error_code"], code]))
            rows = of_code["row_index"].to_numpy()
            numbers[code].append(rows)
            _, first = np.unique(rows, return_index=True)
            for each in of_code.take(pa.array(first[:per_code])).to_pylist():
                named[code].setdefault(each["row_index"], (each["id"], each["error_message"] or ""))
            named[code] = {row: named[code][row] for row in sorted(named[code])[:per_code]}
    found: list[ErrorRow] = []
    for code, parts in numbers.items():
        rows, samples = np.unique(np.concatenate(parts), return_counts=True)
        each_row = zip(rows[: len(named[code])].tolist(), samples.tolist(), strict=False)
        found += [ErrorRow(row, named[code][row][0], count, code, named[code][row][1]) for row, count in each_row]
    counts = {code: len(np.unique(np.concatenate(parts))) for code, parts in sorted(numbers.items())}
    return ErrorRows(tuple(sorted(found, key=lambda each: (each.code, each.row_index))), counts)


def _error_tables(shards: Sequence[ListedFile]) -> Iterator[pa.Table]:
    columns = ["row_index", "id", "error_code", "error_message"]
    for shard in shards:
        with open_shard(shard) as file:
            for group in range(file.num_row_groups):
                if not _all_null(file, group):
                    table = file.read_row_group(group, columns=columns)
                    yield table.filter(pc.call_function("is_valid", [table["error_code"]]))


def _all_null(file: ParquetFile, group: int) -> bool:
    # A list column has several leaf columns in the file: find it by its path.
    described = file.metadata.row_group(group)
    column = next(c for c in map(described.column, range(described.num_columns)) if c.path_in_schema == "error_code")
    statistics = column.statistics
    return statistics is not None and statistics.has_null_count and statistics.null_count == described.num_rows


def _excerpts(shards: Iterable[ListedFile], count: int, whole: bool, id_column: str | None) -> dict[Kind, tuple[Excerpt, ...]]:
    # Enough that `count` rows remain without the up to two times `count` samples that are shown as right or wrong.
    best, most = dict[Kind, list[_Place]](), (2 + _OF_A_ROW) * count
    for shard in shards:
        with open_shard(shard) as file:
            schema = file.schema_arrow
            present = [*_KEYS, *(name for name in verdict_names(schema) if name == CORRECT.name)]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=present)
                for kind, chosen in _candidates(table, whole, most).items():
                    places = [_Place(rank, shard, group, offset) for rank, offset in chosen]
                    best[kind] = _of_each_row([*best.get(kind, ()), *places], _OF_A_ROW)[:most]
        if any(best.values()) and not whole:
            break
    shown, seen = dict[Kind, list[_Place]](), set[tuple[int, ...]]()
    for kind, places in best.items():
        shown[kind] = _of_each_row((each for each in places if each.rank[1:] not in seen), 1)[:count]
        seen.update(each.rank[1:] for each in shown[kind])
    return {
        kind: tuple(_read(place.shard, place.group, place.offset, id_column) for place in places)
        for kind, places in shown.items()
        if places
    }


def _of_each_row(places: Iterable[_Place], most: int) -> list[_Place]:
    """Return the places in the order of their ranks, at most the first `most` of each row."""
    counts, kept = Counter[int](), list[_Place]()
    for place in sorted(places, key=lambda each: each.rank):
        row = place.rank[1]
        counts[row] += 1
        kept += [place] if counts[row] <= most else []
    return kept


def _candidates(table: pa.Table, whole: bool, most: int) -> dict[Kind, list[tuple[tuple[int, int, int], int]]]:
    """Return, for each kind, the first samples of each row, `most` of them by rank: their ranks and their offsets in the
    table."""
    ok: Bool = np.asarray(table["status"].to_pylist(), dtype=object) == "ok"
    rows, samples = table["row_index"].to_numpy(), table["sample_index"].to_numpy()
    masks: dict[Kind, Bool] = {"first": ok}
    if "correct" in table.column_names:
        right = table["correct"].fill_null(False).to_numpy().astype(np.bool_)
        masks = {"right": ok & right, "wrong": ok & ~right}
    ranked: dict[Kind, tuple[Bool, Int64]] = {kind: (mask, np.zeros(len(rows), np.int64)) for kind, mask in masks.items()}
    if whole:
        ranked["longest"] = (ok, -table["num_output_tokens"].fill_null(0).to_numpy().astype(np.int64))
    result: dict[Kind, list[tuple[tuple[int, int, int], int]]] = {}
    for kind, (mask, first) in ranked.items():
        offsets = np.flatnonzero(mask)
        offsets = offsets[np.lexsort((samples[offsets], first[offsets], rows[offsets]))]
        _, starts, which = np.unique(rows[offsets], return_index=True, return_inverse=True)
        offsets = offsets[np.arange(len(offsets)) - starts[which] < _OF_A_ROW]
        offsets = offsets[np.lexsort((samples[offsets], rows[offsets], first[offsets]))][:most]
        keys = zip(first[offsets].tolist(), rows[offsets].tolist(), samples[offsets].tolist(), strict=True)
        result[kind] = list(zip(keys, offsets.tolist(), strict=True))
    return result


def read_samples(shards: Sequence[ListedFile], places: Sequence[int], id_column: str | None = None) -> list[Excerpt]:
    """Return the samples at these places, counted over the rows of all shards, in order, without their texts. Raises as
    `open_shard` does."""
    groups: list[tuple[ListedFile, int]] = []
    sizes: list[int] = []
    for shard in shards if places else ():
        with open_shard(shard) as file:
            numbers = range(file.num_row_groups)
            groups += [(shard, group) for group in numbers]
            sizes += [file.metadata.row_group(group).num_rows for group in numbers]
    ends = np.cumsum(sizes)
    of_group = np.searchsorted(ends, places, side="right").tolist()
    found: dict[int, Excerpt] = {}
    for group in sorted(set(of_group)):
        chosen = [place for place, its in zip(places, of_group, strict=True) if its == group]
        offsets = [place - int(ends[group]) + sizes[group] for place in chosen]
        shard, its_group = groups[group]
        read = _read_all(shard, its_group, offsets, id_column, {*_LONG_COLUMNS, "text"})
        found |= zip(chosen, read, strict=True)
    return [found[place] for place in places]


def _read(shard: ListedFile, group: int, offset: int, id_column: str | None) -> Excerpt:
    return _read_all(shard, group, [offset], id_column)[0]


def _read_all(
    shard: ListedFile, group: int, offsets: Sequence[int], id_column: str | None, without: Collection[str] = _LONG_COLUMNS
) -> list[Excerpt]:
    with open_shard(shard) as file:
        schema = file.schema_arrow
        names = [name for name in schema.names if name not in without]
        table = file.read_row_group(group, columns=names).take(pa.array(offsets))
    rows = list(python_rows(table))
    parse_json_texts(rows, schema, input_names(schema))
    return [_excerpt(values, schema, id_column) for values in rows]


def _excerpt(values: Mapping[str, Any], schema: pa.Schema, id_column: str | None) -> Excerpt:
    own, sources = own_names(schema), row_names(schema, id_column)
    verdicts = {each.name for each in VERDICT_FIELDS if each.name != _SCORE}
    judges = [name for name in verdict_names(schema) if name not in verdicts] if values.get("correct") is not None else []
    return Excerpt(
        values["row_index"],
        values["sample_index"],
        values.get("text") or "",
        values["finish_reason"] or "",
        values["num_output_tokens"] or 0,
        values["correct"] if CORRECT.name in own else None,
        {source: values[name] for name, source in sources.items() if name in values},
        values["verify_error"] or "it is not judged yet" if CORRECT.name in own and values["correct"] is None else "",
        values["cumulative_logprob"],
        {name: values[name] for name in judges if name != _SCORE or values[name] not in (None, 0.0, 1.0)},
        values["id"],
    )
