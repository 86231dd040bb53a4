"""Everything that is settled before weights load: the model's files, the tokenised input, and the plan order.

`prepare` serves `run` and `plan` alike; user errors surface here, within seconds. It writes into the given scratch folder and
nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.engine.replica_sizes import WorkloadFacts, reported_token_bytes
from tokabatch.errors import JobError
from tokabatch.input.batch_files import settle_format
from tokabatch.input.fingerprint import Fingerprint, describe
from tokabatch.input.generation_defaults import describe_ignored
from tokabatch.input.prompt_order import Sharing, longest_first, measure_sharing, order_prompts
from tokabatch.input.prompts.builder import Limits
from tokabatch.input.prompts.notes import describe_answer, describe_unscored
from tokabatch.input.rows import NO_PLACES, RowPlaces, no_judged_row
from tokabatch.input.store.json_types import json_texts, place_name
from tokabatch.input.store.kept_input import Origin, describe_origin, load_kept
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.input.store.tokenized_input import InputStore, ingest
from tokabatch.input.tokenizer.stop_texts import describe_stops
from tokabatch.job import GenerationConfig, Job
from tokabatch.job.engine_limits import least_pages, refuse_small_cache
from tokabatch.number_text import counted
from tokabatch.output.reasoning import ReasoningTags, choose_tags
from tokabatch.output.schema import FailedRow, input_names, output_schema, verdict_fields
from tokabatch.output.unwritable import refuse_unwritable
from tokabatch.scheduling.contracts import Drawn, Requests
from tokabatch.scoring.early_stopping import refuse_majority
from tokabatch.scoring.pool import JudgePool, open_pool
from tokabatch.workload.open_model import OpenModel, open_without_weights, with_weights

Compare = Callable[[Fingerprint, RowDigests | None, RowPlaces], None]
"""Raises if the job must not continue the earlier run, given what decides its output and, once they are read, its rows and
their places."""
CHECKED_ROWS = 4096
"""Number of rows whose references a judge checks at once."""
SHOWN_FAULTS, SHOWN_COLUMNS = 3, 5
MOST_SAMPLES = 1_000_000_000
"""Maximum number of samples of one run."""


@dataclass(frozen=True)
class Demand(OpenModel):
    """A model, and the samples to draw from it, or that may be requested of it."""

    requests: Requests
    num_samples: Int64
    """Number of samples to draw of each request, in plan order."""

    def facts(self) -> WorkloadFacts:
        """Return what the engine's sizes are derived from."""
        sampling, params = self.requests.sampling, self.requests.params
        limit = np.array([kind.max_tokens for kind in sampling], np.int64)[params]
        alternatives = [-1 if kind.logprobs is None else kind.logprobs for kind in sampling]
        token_bytes = np.array([reported_token_bytes(number) for number in alternatives], np.int64)[params]
        total = self.requests.length + limit
        longest = int(total.max(initial=1))
        return WorkloadFacts(
            num_samples=int(self.num_samples.sum()),
            longest_sequence=longest,
            shortest_sequence=int(total.min(initial=longest)),
            longest_output=int(limit.max(initial=1)),
            num_prompts=len(self.requests),
            logprobs=max(alternatives, default=-1),
            reported_bytes=int((self.num_samples * limit * token_bytes).sum()),
            unique_prompt_tokens=int((self.requests.length.astype(np.int64) - self.requests.lcp).sum()),
            is_alike=bool(self.num_samples.sum())
            and len({kind.max_tokens for kind in sampling}) == 1
            and all(kind.has_given_length for kind in sampling),
        )


@dataclass(frozen=True)
class Workload(Demand):
    """A job that is ready to start."""

    store: InputStore
    failures: tuple[FailedRow, ...]
    output_schema: pa.Schema
    samples_of_row: Int64
    """Number of samples of each row of the input, drawn already or not."""
    fingerprint: Fingerprint
    tags: ReasoningTags | None = None
    """The tags that separate reasoning from the answer; None if texts are not split."""
    origin: Origin | None = None
    """What the tokenised input is made of; None if it cannot be kept."""
    taken_over: bool = False
    """Whether the tokenised input was reused from an earlier start."""
    notes: tuple[str, ...] = ()
    """Notes for the user on what may surprise in the model's files, the settings and the rows."""

    @property
    def samples_total(self) -> int:
        """The number of all samples that the output has to account for."""
        return int(self.samples_of_row.sum())

    def with_notes(self, notes: tuple[str, ...]) -> Workload:
        return replace(self, notes=(*notes, *self.notes))

    def without(self, drawn: Drawn) -> Workload:
        """Return what is left to do of the same job."""
        requests = self.requests.without(drawn)
        failures: list[FailedRow] = []
        for failure in self.failures:
            begin, end = drawn.start[failure.row_index : failure.row_index + 2]
            left = np.flatnonzero(~drawn.flags[begin:end]).astype(np.int32)
            if len(left):
                failures.append(replace(failure, samples=left))
        return replace(self, requests=requests, num_samples=requests.num_samples(), failures=tuple(failures))

    @property
    def error_counts(self) -> tuple[tuple[str, int], ...]:
        """The number of rows that could not become prompts, by error code."""
        return tuple(sorted(Counter(failure.error.code for failure in self.failures).items()))

    def sharing(self) -> Sharing:
        return measure_sharing(self.requests.length, self.requests.lcp, self.num_samples)


def prepare(
    job: Job,
    scratch: Path,
    on_rows: Callable[[int, int], None] | None = None,
    *,
    weights: bool = True,
    compare: Compare | None = None,
    kept: Path | None = None,
    clock: Callable[[], str] = str,
    absent_gpu: bool = False,
    begun: bool = False,
) -> Workload:
    """Check the verifier and the model, read and tokenise the input, and order it.

    `on_rows` is called with the numbers of rows and error rows read so far. Weights that are still on the hub are downloaded
    last, and only if `weights` is True; otherwise a local model needs none, either. `kept` may hold the tokenised input of an
    earlier start, which is reused if it is the same job's. `compare` is called as soon as there is more to compare with an
    earlier run: settings, rows, weights. `clock` returns the time that templates see, once the settings are compared.
    `absent_gpu`: plan for a GPU that is not in this machine. `begun`: samples of the run are committed, which is continued even
    if no row can be judged. Raises UsageError for whatever cannot work.
    """
    pool = None if job.verify is None else open_pool(job.verify)
    judge = None if pool is None else pool.load()
    verdicts = () if judge is None else verdict_fields(judge.columns)
    if job.verify is not None and judge is not None:
        refuse_majority(job.verify, judge.columns)
    job = settle_format(job)
    model, ends, checkpoint = open_without_weights(job, weights=weights, absent_gpu=absent_gpu)
    tokenizer, spec, generation = model.tokenizer, model.spec, model.generation
    tags = None
    if job.output.split_reasoning is not None:
        tags = choose_tags(
            job.output.split_reasoning,
            templates=tokenizer.chat_templates.values(),
            is_token=lambda text: len(tokenizer.encode_batch([text], False)[0]) == 1,
            special=tokenizer.special_texts,
        )
    compare = compare or _accept
    fingerprint = _fingerprint(job, model)
    compare(fingerprint, None, NO_PLACES)
    limits, now = Limits(spec.context_length, spec.vocab_size), clock()
    origin = None if kept is None else describe_origin(job, fingerprint, generation, limits, now)
    taken_over = load_kept(kept, origin) if kept and origin else None
    store = taken_over or ingest(
        job,
        tokenizer,
        scratch,
        limits.context_length,
        generation=generation,
        vocab_size=limits.vocab_size,
        on_rows=on_rows,
        clock=now,
    )
    fingerprint = fingerprint.with_rows(store.digests)
    compare(fingerprint, store.digests, store.places)
    samples_of_row = _samples_of_row(store, generation.n)
    requests = order_requests(store, job.engine.page_size)
    if checkpoint is None and weights:
        model = with_weights(job, model)
        fingerprint = replace(fingerprint, settings=_fingerprint(job, model).settings)
        compare(fingerprint, None, NO_PLACES)
    schema = output_schema(
        store.column_schema,
        id_column=job.input.id_column,
        verdicts=verdicts,
        reasoning=tags is not None,
        scored=job.mode == "score",
    )
    refuse_unwritable(schema)
    renamed = [f"{source} as {name}" for name, source in input_names(schema).items() if source != name]
    places = json_texts(store.column_schema)
    mixed = ", ".join(map(place_name, places[:SHOWN_COLUMNS])) + ", …" * (len(places) > SHOWN_COLUMNS)
    everything = np.arange(generation.n, dtype=np.int32)
    num_samples = requests.num_samples()
    if len(requests):
        # Refused before anything is written: the message proposes other settings, which would make it another job.
        facts = Demand(**vars(model), requests=requests, num_samples=num_samples).facts()
        refuse_small_cache(job.engine, least_pages(facts.shortest_sequence, job.engine.page_size))
    weightless = checkpoint is None and Path(job.model.path).expanduser().is_dir()
    return Workload(
        **vars(model),
        store=store,
        requests=requests,
        num_samples=num_samples,
        failures=tuple(FailedRow(row, everything, error) for row, error in sorted(store.errors.items())),
        output_schema=schema,
        samples_of_row=samples_of_row,
        fingerprint=fingerprint,
        notes=(
            *(
                ("warning: no row can be completed: correct the job or its rows",)
                if len(store.errors) == store.num_rows
                else ()
            ),
            *tokenizer.describe(spec.vocab_size),
            *((ends.note,) if ends.note else ()),
            *((f"{model.folder} holds no weights: a plan needs none, a run does",) if weightless else ()),
            *describe_ignored(model.folder, job, model.settings),
            *store.notes,
            *(
                (
                    f"input columns with names that the output uses itself are renamed there: {', '.join(renamed)}"
                    + (
                        "; input.id_column=id makes it the output's id"
                        if "id as input_id" in renamed and job.input.id_column is None
                        else ""
                    ),
                )
                if renamed
                else ()
            ),
            *((f"input columns that no single type fits are JSON text in the output: {mixed}",) if mixed else ()),
            *(
                ()
                if pool is None or taken_over
                else _reference_notes(store, pool, job.verify and job.verify.answer, begun=begun)
            ),
            *describe_answer(job),
            *describe_unscored(job),
            *describe_stops(_stops(store, generation), tokenizer, tokenizer.special_texts),
            *_describe_greedy(store, job.mode),
        ),
        tags=tags,
        origin=origin,
        taken_over=taken_over is not None,
    )


def _fingerprint(job: Job, model: OpenModel) -> Fingerprint:
    """Return what decides the output, as far as it is determined before the rows are read."""
    marks = {file.name: file.mark for file in model.files}
    return describe(job, model.generation, marks, model.eos_token_ids, str(model.dtype).removeprefix("torch."))


def _describe_greedy(store: InputStore, mode: str) -> tuple[str, ...]:
    """Return a note if rows get several samples that are all the likeliest one."""
    drawn = store.params[store.length > 0]
    alike = [kind.temperature == 0 and kind.n > 1 for kind in store.sampling]
    rows = int(np.array(alike, bool)[drawn].sum()) if alike else 0
    if mode != "generate" or not rows:
        return ()
    whose = "all rows" if rows == len(drawn) else f"{rows:,} of {counted(len(drawn), 'row')}"
    return (
        f"warning: generation.temperature is 0 and generation.n above 1 for {whose}: the samples of a row are all the "
        "likeliest one and hardly differ; set a temperature above 0 for samples that do",
    )


def _reference_notes(store: InputStore, pool: JudgePool, answer: str | None, *, begun: bool) -> tuple[str, ...]:
    """Return notes on rows with prompts that the judge finds, before any text, cannot be judged. Raises JobError if it finds so
    of every row, unless the run has `begun`."""
    faults: dict[int, str] = {}
    judged = refused = 0
    for begin in range(0, store.num_rows, CHECKED_ROWS):
        rows = np.arange(begin, min(begin + CHECKED_ROWS, store.num_rows), dtype=np.int64)
        rows = rows[store.length[rows] > 0]
        judged += len(rows)
        values = store.input_rows(rows)
        found = pool.check(values)
        nulls = [answer is not None and value.get(answer) is None for value in values]
        for row, fault, null in zip(rows.tolist(), found, nulls, strict=True):
            refused += isinstance(fault, str)
            if fault is not None or null:
                faults[row] = f"its column {answer!r} is null" if fault is None else str(fault)
    if not faults:
        return ()
    if refused == judged and not begun:
        row, fault = next(iter(faults.items()))
        raise no_judged_row(store.places.name(row), fault)
    shown = [
        f"warning: {store.places.name(row)} cannot be judged: {fault}" for row, fault in list(faults.items())[:SHOWN_FAULTS]
    ]
    more = len(faults) - len(shown)
    return (*shown, *((f"warning: {counted(more, 'more row')} cannot be judged",) if more else ()))


def _accept(fingerprint: Fingerprint, digests: RowDigests | None, places: RowPlaces) -> None:
    """Accept the job: there is no earlier run."""


def _stops(store: InputStore, generation: GenerationConfig) -> dict[str, str]:
    """Return every stop string, and where it was first written."""
    good = np.flatnonzero(store.length > 0)
    used, first = np.unique(store.params[good], return_index=True)
    stops: dict[str, str] = {}
    for number, row in zip(used.tolist(), good[first].tolist(), strict=True):
        for stop in store.sampling[number].stop:
            stops.setdefault(stop, f"sampling_params.stop of {store.places.name(row)}")
    return stops | dict.fromkeys(generation.stop, "generation.stop")


def _samples_of_row(store: InputStore, n: int) -> Int64:
    """Return the number of samples of each row: the job's own for a row without a prompt. Raises JobError if there are too
    many."""
    samples = np.full(store.num_rows, n, np.int64)
    good = np.flatnonzero(store.length > 0)
    samples[good] = np.array([params.n for params in store.sampling], np.int64)[store.params[good]]
    total = int(samples.sum())
    if total > MOST_SAMPLES:
        raise JobError(
            f"generation.n: {counted(len(samples), 'row comes', 'rows come')} to {counted(total, 'sample')}; a run has at "
            f"most {MOST_SAMPLES:,}, as it keeps a record of each. Lower generation.n (or n in sampling_params), or give "
            "parts of the rows to jobs of their own (input.path)"
        )
    return samples


def order_requests(store: InputStore, page_size: int) -> Requests:
    """Return the rows that have prompts, in plan order; those that may run longest come first as far as sharing allows."""
    rows = np.flatnonzero(store.length > 0)
    start, length = store.start[rows], store.length[rows]
    order = order_prompts(store.tokens, start, length)
    expected = np.array([params.max_tokens for params in store.sampling], np.int32)[store.params[rows]]
    order = longest_first(order, store.tokens, start, length, expected, page_size)
    chosen = rows[order.permutation]
    return Requests(
        row_index=chosen.astype(np.int64),
        tokens=store.tokens,
        start=store.start[chosen],
        length=store.length[chosen],
        lcp=order.lcp,
        params=store.params[chosen],
        sampling=store.sampling,
        continuations=store.continuations,
    )
