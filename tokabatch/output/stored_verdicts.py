"""The verdicts of a run's samples, read back from its shards: only small columns, a few numbers per sample."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.output.manifest import Manifest
from tokabatch.output.schema import CANCELLED, verdict_names
from tokabatch.output.shards import read_groups
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.storage.listing import ListedFile

_VERDICT = ("correct", "verify_score", "verify_error", "extracted")
_COLUMNS = ("row_index", "sample_index", "status", "cumulative_logprob", *_VERDICT)


def read_verdicts(
    shards: Sequence[ListedFile], manifest: Manifest | None = None, *, characters: bool = False
) -> Mapping[str, npt.NDArray[Any]] | None:
    """Return arrays of one length, an entry for each sample in the shards: `row`, `number`, `correct`, `score` (0 without a
    verdict), `answer` (a number for each distinct answer, -1 for none), `logprob` (NaN if it was not recorded, else minus
    infinity for error rows), `ok`, `cancelled`, `verdict` (whether it has one), `unjudged` (still to be judged by the judge of
    `manifest`), and with `characters` the length of its text, stripped of white space. None if the samples are not judged.
    Raises as `read_groups` does."""
    names_of_parts = ("row", "number", "correct", "score", "logprob", "status", "verdict", "unjudged", "answer")
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names_of_parts}
    numbers: dict[bytes, int] = {}
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
            known = table["correct"].is_valid().to_numpy() if "correct" in names else np.zeros(table.num_rows, np.bool_)
            parts["verdict"].append(known)
            score = _or(table, "verify_score", names, 0.0, pa.float64())
            parts["score"].append(score if "verify_score" in names else correct.astype(np.float64))
            parts["logprob"].append(table["cumulative_logprob"].cast(pa.float64()).fill_null(np.nan).to_numpy())
            parts["status"].append(table["status"].to_numpy())
            unjudged = np.full(table.num_rows, manifest is not None and not manifest.is_judge_of(table.schema.metadata))
            if "verify_error" in names:
                unjudged |= np.array([reason == NOT_JUDGED for reason in table["verify_error"].to_pylist()], np.bool_)
            parts["unjudged"].append(unjudged)
            known = table["extracted"] if "extracted" in names else pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
            parts["answer"] += [_numbered(chunk, numbers) for chunk in known.cast(pa.string()).chunks]
            if characters:
                text = pc.call_function("utf8_trim_whitespace", [table["text"].fill_null("")])
                lengths.append(pc.call_function("utf8_length", [text]).to_numpy().astype(np.int64))
    if not judged:
        return None
    found = {name: np.concatenate(values) for name, values in parts.items()}
    status, logprob = found.pop("status"), found["logprob"]
    ok, cancelled = status == "ok", status == CANCELLED
    if ok.any() and not np.isnan(logprob[ok]).any():
        found["logprob"] = np.where(ok, logprob, -np.inf)
    more = {"characters": np.concatenate(lengths)} if characters else {}
    return {**found, "ok": ok, "cancelled": cancelled, **more}


def _numbered(answers: pa.Array[Any], numbers: dict[bytes, int]) -> npt.NDArray[np.int64]:
    """Return the number of each answer, -1 for none. `numbers` holds those assigned so far, by digest: answers may be whole
    texts, which together need not fit in memory."""
    encoded = answers.dictionary_encode()
    digests = (hashlib.blake2b(text.encode(), digest_size=16).digest() for text in encoded.dictionary.to_pylist())
    known = np.array([*(numbers.setdefault(digest, len(numbers)) for digest in digests), -1], np.int64)
    return known[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _or(table: pa.Table, name: str, names: Sequence[str], otherwise: object, kind: pa.DataType) -> npt.NDArray[Any]:
    """Return the column, with `otherwise` for nulls and for a missing column."""
    if name not in names:
        return np.full(table.num_rows, otherwise)
    return table[name].cast(kind).fill_null(pa.scalar(otherwise, kind)).to_numpy()
