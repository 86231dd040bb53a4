"""The verdicts of a run's samples, read back from its shards: small columns alone, every sample a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.output.schema import CANCELLED, verdict_names
from tokabatch.output.shards import read_groups
from tokabatch.storage.listing import ListedFile

_COLUMNS = ("row_index", "sample_index", "status", "cumulative_logprob", "correct", "verify_score", "extracted")


def read_verdicts(shards: Sequence[ListedFile], *, characters: bool = False) -> Mapping[str, npt.NDArray[Any]] | None:
    """Arrays of one length, an entry for each sample that the shards hold: `row`, `number`, `correct`, `score` (0 without a
    verdict), `answer` (a number for each different answer, -1 for none), `logprob` (NaN where it was not recorded, minus
    infinity of error rows where it was), `cancelled`, and with `characters` that number in its text, none at the ends being
    white space. None where the samples are not judged. Raises as `read_groups`
    does."""
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("row", "number", "correct", "score", "logprob", "status")}
    answers: list[pa.ChunkedArray] = []
    lengths: list[npt.NDArray[np.int64]] = []
    judged = False
    for shard in shards:
        for table in read_groups(shard, (*_COLUMNS, *(("text",) if characters else ()))):
            names = verdict_names(table.schema)
            judged |= "correct" in names
            correct = _or(table, "correct", names, False, pa.bool_())
            parts["row"].append(table["row_index"].to_numpy())
            parts["number"].append(table["sample_index"].to_numpy().astype(np.int64))
            parts["correct"].append(correct)
            score = _or(table, "verify_score", names, 0.0, pa.float64())
            parts["score"].append(score if "verify_score" in names else correct.astype(np.float64))
            parts["logprob"].append(table["cumulative_logprob"].cast(pa.float64()).fill_null(np.nan).to_numpy())
            parts["status"].append(table["status"].to_numpy())
            known = table["extracted"] if "extracted" in names else pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
            if characters:
                text = pc.call_function("utf8_trim_whitespace", [table["text"].fill_null("")])
                lengths.append(pc.call_function("utf8_length", [text]).to_numpy().astype(np.int64))
            answers.append(known.cast(pa.string()))
    if not judged:
        return None
    encoded = pa.chunked_array([chunk for each in answers for chunk in each.chunks], pa.string()).combine_chunks()
    numbers = encoded.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    found = {name: np.concatenate(values) for name, values in parts.items()}
    status, logprob = found.pop("status"), found["logprob"]
    ok, cancelled = status == "ok", status == CANCELLED
    if ok.any() and not np.isnan(logprob[ok]).any():
        found["logprob"] = np.where(ok, logprob, -np.inf)
    more = {"characters": np.concatenate(lengths)} if characters else {}
    return {**found, "answer": numbers, "cancelled": cancelled, **more}


def _or(table: pa.Table, name: str, names: Sequence[str], otherwise: object, kind: pa.DataType) -> npt.NDArray[Any]:
    """The column, `otherwise` for its nulls and where there is none."""
    if name not in names:
        return np.full(table.num_rows, otherwise)
    return table[name].cast(kind).fill_null(pa.scalar(otherwise, kind)).to_numpy()
