"""Tables of the output's schema from finished samples: decoded, their reasoning split off, with the columns of their rows.

A table that cannot be built is halved until the samples stand alone whose columns are at fault; these become error rows that
keep the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from tokabatch.errors import STOPS, TokabatchError
from tokabatch.output.reasoning import split_reasoning
from tokabatch.output.schema import UnsampledRow, build_table, input_names, sample_keys, sample_texts
from tokabatch.output.unwritable import build_piecemeal, key_table
from tokabatch.runner.waiting_samples import FinishedSample
from tokabatch.scheduling.contracts import Completion
from tokabatch.scoring.judge import verdict_columns
from tokabatch.workload.prepare import Workload

TAG_TOKENS = 16
"""The number of tokens at the end of a prompt that are searched for the tag that begins the reasoning."""


class SampleTables:
    """Builds the tables of a workload's samples, with the verdict's columns `verdict_names`."""

    def __init__(self, workload: Workload, verdict_names: Sequence[str]) -> None:
        self._schema = workload.output_schema
        self._store = workload.store
        self._tags = workload.tags
        self._tokenizer = workload.tokenizer
        self._tokenizer.get_ready_to_decode()
        self._verdict_names = verdict_names

    def build(self, finished: Sequence[FinishedSample], failures: Sequence[UnsampledRow]) -> Iterator[pa.Table]:
        """Yield tables of all these samples: one, unless some samples cannot be converted."""
        try:
            whole = self._table(self._schema, finished, failures)
        except BaseException as error:
            if not is_of_rows(error):
                raise
        else:
            yield whole
            return
        if len(finished) + len(failures) > 1:
            c, f = len(finished) // 2, len(failures) // 2
            for part in ((finished[:c], ()), (finished[c:], ()), ((), failures[:f]), ((), failures[f:])):
                if part[0] or part[1]:
                    yield from self.build(*part)
            return
        key = key_table([each.completion for each in finished], failures)
        yield build_piecemeal(self._schema, key, lambda schema: self._table(schema, finished, failures))

    def texts(self, completions: Sequence[Completion]) -> list[str]:
        """Return the decoded text of each sample. For a scored text it is the continuation, or the whole text if its row is
        scored as a whole."""
        if self._store.continuations is not None:
            heads = [self._store.prompt(completion.row_index)[-1:] for completion in completions]
            begins = self._tokenizer.decode_batch(heads)
            both = zip(heads, (completion.token_ids for completion in completions), strict=True)
            wholes = self._tokenizer.decode_batch([np.concatenate(pair) for pair in both])
            is_whole = [self._store.scored_whole[completion.row_index] for completion in completions]
            parts = zip(wholes, begins, is_whole, strict=True)
            return [text if whole else text.removeprefix(begin) for text, begin, whole in parts]
        least = [self._store.sampling[self._store.params[completion.row_index]].min_tokens for completion in completions]
        return sample_texts(completions, least, self._tokenizer.decode_batch)

    def answers(self, completions: Sequence[Completion], texts: Sequence[str]) -> Sequence[str]:
        """Return what is judged of each text: the answer after the reasoning, if that is split off."""
        return texts if self._tags is None else [answer or "" for _, answer in self._split(completions, texts)]

    def _table(self, schema: pa.Schema, finished: Sequence[FinishedSample], failures: Sequence[UnsampledRow]) -> pa.Table:
        """`schema` is the output's, or a part of it."""
        completions = [each.completion for each in finished]
        rows, _ = sample_keys(completions, failures)
        wanted = set(input_names(schema).values())
        columns = self._store.columns(rows, [name for name in self._store.column_schema.names if name in wanted])
        texts = [""] * len(completions)
        split = self._tags is not None and not {"reasoning_text", "answer_text"}.isdisjoint(schema.names)
        if "text" in schema.names or split:
            texts = [each.text for each in finished if each.text is not None]
            texts = texts if len(texts) == len(finished) else self.texts(completions)
        more = verdict_columns([each.verdict for each in finished], self._verdict_names)
        if split:
            parts = self._split(completions, texts)
            more |= {"reasoning_text": [part for part, _ in parts], "answer_text": [part for _, part in parts]}
        ids = self._store.ids(rows) if "id" in schema.names else []
        completions = [
            replace(each, error_message=f"{line}: {each.error_message}")
            if each.error_message and (line := self._store.places.line(each.row_index))
            else each
            for each in completions
        ]
        return build_table(schema, completions, failures, texts=texts, ids=ids, columns=columns, more=more)

    def _split(self, completions: Sequence[Completion], texts: Sequence[str]) -> list[tuple[str | None, str | None]]:
        """Return the reasoning and the answer of each text. A text without an end tag is reasoning if its prompt began it."""
        assert self._tags is not None
        tags, parts = self._tags, list[tuple[str | None, str | None]]()
        for completion, text in zip(completions, texts, strict=True):
            begun = False
            if tags.end not in text:
                tail = self._store.prompt(completion.row_index)[-TAG_TOKENS:].tolist()
                begun = self._tokenizer.decode_batch([tail], skip_special_tokens=False)[0].rstrip().endswith(tags.begin)
            parts.append(split_reasoning(text, tags, begun=begun))
        return parts


def is_of_rows(error: BaseException) -> bool:
    """Return whether single rows may have caused an exception: it does not end the program, is not an error of the system
    (PyArrow raises OSError without a number for values that it cannot encode), and has no remedy of its own."""
    return not isinstance(error, (*STOPS, TokabatchError)) and not (isinstance(error, OSError) and error.errno is not None)
