"""Everything that is settled before weights load: the model's files, the tokenised input, and the plan order.

`prepare` serves `run` and `plan` alike; whatever the user got wrong surfaces here, in seconds. It writes into the scratch
folder it is given and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from tokabatch.arrays import Int64
from tokabatch.attention import choose_backend
from tokabatch.engine.replica_sizes import WorkloadFacts, reported_token_bytes
from tokabatch.errors import JobError, ModelError
from tokabatch.input.batch_files import settle_format
from tokabatch.input.fingerprint import Fingerprint, describe
from tokabatch.input.generation_defaults import EndTokens, describe_ignored, effective_generation, find_end_tokens
from tokabatch.input.prompt_order import Sharing, longest_first, measure_sharing, order_prompts
from tokabatch.input.prompts.builder import Limits
from tokabatch.input.prompts.row_settings import refuse_beyond
from tokabatch.input.rows import NO_PLACES, RowPlaces
from tokabatch.input.store.kept_input import Origin, describe_origin, load_kept
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.input.store.tokenized_input import InputStore, ingest
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.input.tokenizer.stop_texts import describe_stops, refuse_special
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import GenerationConfig, Job, Setting
from tokabatch.model.checkpoint import Checkpoint, preflight
from tokabatch.model.config import read_config
from tokabatch.model.families import read_spec
from tokabatch.model.file_digests import ModelFile, known_files
from tokabatch.model.partition import check_mesh
from tokabatch.model.resolve import resolve_model
from tokabatch.model.spec import ModelSpec
from tokabatch.model.weights import named_dtype, resolve_dtype
from tokabatch.output.reasoning import ReasoningTags, choose_tags
from tokabatch.output.schema import FailedRow, input_names, output_schema, verdict_fields
from tokabatch.output.shards import refuse_unwritable
from tokabatch.parallel.layout import Layout, decide_layout, visible_devices
from tokabatch.parallel.mesh import Mesh
from tokabatch.scheduling.contracts import Drawn, Requests
from tokabatch.scoring.judge import ANSWER
from tokabatch.scoring.pool import JudgePool, open_pool

Compare = Callable[[Fingerprint, RowDigests | None, RowPlaces], None]
"""Raises where the job is not to go on, given what decides its output, and once they are read its rows and their places."""
CHECKED_ROWS = 4096
"""Rows given to a judge at once to look at their references."""
SHOWN_FAULTS = 3
MOST_SAMPLES = 1_000_000_000
"""Of one run."""
FP8_CAPABILITY = (8, 9)
"""The first NVIDIA compute capability with e4m3."""


@dataclass(frozen=True)
class OpenModel:
    """A model and its tokenizer, read and checked, without its weights."""

    folder: Path
    files: tuple[ModelFile, ...]
    """The model's and the tokenizer's, as they were read."""
    spec: ModelSpec
    device: str
    layout: Layout
    dtype: torch.dtype
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    generation: GenerationConfig
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Demand(OpenModel):
    """A model, and the samples that are to be drawn from it, or such as may come to be."""

    requests: Requests
    num_samples: Int64
    """Samples to draw of each request, in plan order."""

    def facts(self) -> WorkloadFacts:
        """What the engine's sizes follow from."""
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
        )


@dataclass(frozen=True)
class Workload(Demand):
    """A job that can start."""

    store: InputStore
    failures: tuple[FailedRow, ...]
    output_schema: pa.Schema
    samples_of_row: Int64
    """Samples of each row of the input, whether drawn already or not."""
    fingerprint: Fingerprint
    tags: ReasoningTags | None = None
    """Where texts are split into thinking and answer; None where they are not."""
    origin: Origin | None = None
    """What the tokenised input is made of; None where it cannot be kept."""
    taken_over: bool = False
    """Whether the tokenised input is that of an earlier start."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: what the model's files, the settings and the rows have in them that may surprise."""

    @property
    def samples_total(self) -> int:
        """All samples that the output has to account for."""
        return int(self.samples_of_row.sum())

    def without(self, drawn: Drawn) -> Workload:
        """What is left to do of the same job."""
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
        """Rows that could not become prompts, by code."""
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
    clock: str = "",
    absent_gpu: bool = False,
) -> Workload:
    """Check the verifier and the model, read and tokenise the input, order it. Raises UsageError for whatever cannot work;
    `on_rows` is told the rows and error rows read so far. Weights that are still on the hub are fetched
    last, and only if `weights` says so.
    `kept` is where the tokenised input of an earlier start may lie: it is taken over where it is this job's. `clock` is the
    time that templates see.
    `compare` is called as soon as there is more to compare with an earlier run: settings, rows, weights.
    `absent_gpu`: for a GPU that is not here, of which nothing can be asked."""
    pool = None if job.verify is None else open_pool(job.verify)
    judge = None if pool is None else pool.load()
    stop = None if job.verify is None else job.verify.stop
    if judge is not None and stop is not None and stop.majority is not None and ANSWER not in judge.columns:
        raise JobError(
            f"verify.stop.majority counts equal answers, and the judge extracts none: its COLUMNS have no {ANSWER!r}. Use one "
            "that does, such as gsm8k or choice, or verify.stop.after_correct"
        )
    job = settle_format(job)
    model, ends, checkpoint = _open(job, absent_gpu=absent_gpu)
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
    limits = Limits(spec.context_length, spec.vocab_size)
    origin = None if kept is None else describe_origin(job, fingerprint, generation, limits, clock)
    taken_over = load_kept(kept, origin) if kept and origin else None
    store = taken_over or ingest(
        job,
        tokenizer,
        scratch,
        limits.context_length,
        generation=generation,
        vocab_size=limits.vocab_size,
        on_rows=on_rows,
        clock=clock,
    )
    fingerprint = fingerprint.with_rows(store.digests)
    compare(fingerprint, store.digests, store.places)
    samples_of_row = _samples_of_row(store, generation.n)
    requests = order_requests(store, job.engine.page_size)
    if checkpoint is None and weights:
        model = _with_weights(job, model)
        fingerprint = replace(fingerprint, settings=_fingerprint(job, model).settings)
        compare(fingerprint, None, NO_PLACES)
    schema = output_schema(
        store.column_schema,
        id_column=job.input.id_column,
        verdicts=() if judge is None else verdict_fields(judge.columns),
        reasoning=tags is not None,
        scored=job.mode == "score",
    )
    refuse_unwritable(schema)
    renamed = [f"{source} as {name}" for name, source in input_names(schema).items() if source != name]
    everything = np.arange(generation.n, dtype=np.int32)
    return Workload(
        **vars(model),
        store=store,
        requests=requests,
        num_samples=requests.num_samples(),
        failures=tuple(FailedRow(row, everything, error) for row, error in sorted(store.errors.items())),
        output_schema=schema,
        samples_of_row=samples_of_row,
        fingerprint=fingerprint,
        notes=(
            *tokenizer.describe(spec.vocab_size),
            *((ends.note,) if ends.note else ()),
            *describe_ignored(model.folder, job, model.settings),
            *store.notes,
            *(
                (f"columns of the input with names of the output's own are written as others: {', '.join(renamed)}",)
                if renamed
                else ()
            ),
            *(() if pool is None or taken_over else _reference_notes(store, pool, job.verify.answer if job.verify else None)),
            *describe_stops(_stops(store, generation), tokenizer, tokenizer.special_texts),
        ),
        tags=tags,
        origin=origin,
        taken_over=taken_over is not None,
    )


def open_model(job: Job) -> OpenModel:
    """The job's model and tokenizer; what is not here of them is fetched. Raises UsageError for what cannot work."""
    model, _, checkpoint = _open(job)
    return model if checkpoint else _with_weights(job, model)


def _open(job: Job, *, absent_gpu: bool = False) -> tuple[OpenModel, EndTokens, Checkpoint | None]:
    """Weights that are still on the hub stay there; there is no checkpoint then."""
    device = "cuda" if absent_gpu else pick_device(job)
    layout = decide_layout(job.engine, device, None if absent_gpu else visible_devices())
    folder = resolve_model(job.model.path, job.model.revision, weights=False)
    tokenizer_folder = _tokenizer_folder(job, folder)
    # Known before they are read: what changes in between is noticed when the weights load.
    files = known_files(folder, tokenizer_folder)
    spec = read_spec(folder)
    check_mesh(spec, Mesh(0, layout.tensor, layout.pipeline))
    checkpoint = preflight(folder, spec) if Path(job.model.path).expanduser().is_dir() else None
    dtype = _choose_dtype(job, device, folder, spec, checkpoint)
    if not absent_gpu:
        _check_fp8(job, device, dtype, spec)
    key = "path" if job.model.tokenizer is None else "tokenizer"
    tokenizer = load_tokenizer(job.model.model_copy(update={key: str(tokenizer_folder)}))
    if tokenizer.own_vocab_size > spec.vocab_size:
        raise ModelError(
            f"the tokenizer of {tokenizer.name!r} has ids up to {tokenizer.own_vocab_size - 1}, but the model in {folder} has "
            f"embeddings for {spec.vocab_size} only (config.json: vocab_size). Use the tokenizer that belongs to these weights."
        )
    generation, settings = effective_generation(job, folder)
    _check_generation(generation, spec, tokenizer)
    ends = find_end_tokens(folder, tokenizer)
    model = OpenModel(
        folder=folder,
        files=files,
        spec=spec,
        device=device,
        layout=layout,
        dtype=dtype,
        tokenizer=tokenizer,
        eos_token_ids=ends.ids,
        generation=generation,
        settings=settings,
    )
    return model, ends, checkpoint


def _tokenizer_folder(job: Job, folder: Path) -> Path:
    """`folder` is the model's."""
    return folder if job.model.tokenizer is None else resolve_model(job.model.tokenizer, weights=False, key="model.tokenizer")


def _with_weights(job: Job, model: OpenModel) -> OpenModel:
    """Fetch them, and take in what only they can tell."""
    checkpoint = preflight(resolve_model(job.model.path, job.model.revision), model.spec)
    dtype = _choose_dtype(job, model.device, model.folder, model.spec, checkpoint)
    return replace(model, dtype=dtype, files=known_files(model.folder, _tokenizer_folder(job, model.folder)))


def _fingerprint(job: Job, model: OpenModel) -> Fingerprint:
    """What decides the output, as far as it is known before the rows are read."""
    marks = {file.name: file.mark for file in model.files}
    return describe(job, model.generation, model.eos_token_ids, marks, str(model.dtype).removeprefix("torch."))


def _reference_notes(store: InputStore, pool: JudgePool, answer: str | None) -> tuple[str, ...]:
    """Which of the rows that have prompts cannot be judged, whatever the text, as far as the judge can tell beforehand."""
    faults: dict[int, str] = {}
    for begin in range(0, store.num_rows, CHECKED_ROWS):
        rows = np.arange(begin, min(begin + CHECKED_ROWS, store.num_rows), dtype=np.int64)
        rows = rows[store.length[rows] > 0]
        values = store.input_rows(rows)
        found = pool.check(values)
        nulls = [answer is not None and value.get(answer) is None for value in values]
        for row, fault, null in zip(rows.tolist(), found, nulls, strict=True):
            if fault is not None or null:
                faults[row] = fault or f"its column {answer!r} is null"
    if not faults:
        return ()
    told = [f"{store.places.name(row)} cannot be judged: {fault}" for row, fault in list(faults.items())[:SHOWN_FAULTS]]
    more = len(faults) - len(told)
    return (*told, *((f"{more:,} more rows cannot be judged",) if more else ()))


def _accept(fingerprint: Fingerprint, digests: RowDigests | None, places: RowPlaces) -> None:
    """There is no earlier run."""


def _stops(store: InputStore, generation: GenerationConfig) -> dict[str, str]:
    """Every stop string, and where it was written first."""
    good = np.flatnonzero(store.length > 0)
    used, first = np.unique(store.params[good], return_index=True)
    stops: dict[str, str] = {}
    for number, row in zip(used.tolist(), good[first].tolist(), strict=True):
        for stop in store.sampling[number].stop:
            stops.setdefault(stop, f"sampling_params.stop of {store.places.name(row)}")
    return stops | dict.fromkeys(generation.stop, "generation.stop")


def _samples_of_row(store: InputStore, n: int) -> Int64:
    """A row that could not become a prompt has the job's own number. Raises JobError where they are too many."""
    samples = np.full(store.num_rows, n, np.int64)
    good = np.flatnonzero(store.length > 0)
    samples[good] = np.array([params.n for params in store.sampling], np.int64)[store.params[good]]
    total = int(samples.sum())
    if total > MOST_SAMPLES:
        raise JobError(
            f"generation.n: the {len(samples):,} rows come to {total:,} samples; a run has at most {MOST_SAMPLES:,}, of "
            "each of which it keeps a note. Lower generation.n (or n in sampling_params), or give parts of the rows to jobs "
            "of their own (input.path)"
        )
    return samples


def _choose_dtype(job: Job, device: str, folder: Path, spec: ModelSpec, checkpoint: Checkpoint | None) -> torch.dtype:
    """`auto` is float32 on a CPU and the checkpoint's own elsewhere; its config speaks for one that is not here yet."""
    stated = "float32" if job.model.dtype == "auto" and device == "cpu" else job.model.dtype
    if stated == "auto" and checkpoint is None:
        values = read_config(folder).values
        stated = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return named_dtype(stated) if checkpoint is None else resolve_dtype(stated, spec, checkpoint)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of special tokens by their text: a stop string that spells one means the token."""
    texts = sorted(tokenizer.special_texts)
    return {text: ids[0] for text, ids in zip(texts, tokenizer.encode_batch(texts, False), strict=True) if len(ids) == 1}


def pick_device(job: Job) -> str:
    """`cpu` or `cuda`. Raises JobError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if job.engine.device == "cuda" and not available:
        raise JobError("engine.device is cuda, but torch sees no GPU; write auto or cpu, or install a CUDA build of torch")
    return "cuda" if available and job.engine.device != "cpu" else "cpu"


def _check_fp8(job: Job, device: str, dtype: torch.dtype, spec: ModelSpec) -> None:
    """Raises JobError where e4m3 is asked for and the device has no units for it, or what uses them is not there."""
    asked = {"model.quantization": job.model.quantization, "engine.kv_cache_dtype": job.engine.kv_cache_dtype}
    key = next((key for key, value in asked.items() if value == "fp8"), None)
    if key is None:
        return
    if device != "cuda" or torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise JobError(f"{key} is fp8, which needs an NVIDIA GPU of the Ada or Hopper generation or later; remove it here")
    _, obstacle = choose_backend(device, dtype, spec.head_dim)
    if obstacle:
        raise JobError(f"{key} is fp8, which needs FlashInfer's kernels: {obstacle}. Provide that, or remove it")


def order_requests(store: InputStore, page_size: int) -> Requests:
    """The rows that have prompts, in plan order; those that may run longest come first as far as sharing allows."""
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


def _check_generation(generation: GenerationConfig, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """What only the model can tell of the job's own settings; a row's settings cost that row alone."""
    ids = [word for word in generation.bad_words if not isinstance(word, str)]
    given = {name: getattr(generation, name) for name in generation.model_fields_set} | {"bad_words": ids}
    params = GenerationConfig.model_validate(given).params()
    fault = refuse_beyond(params, spec.vocab_size) or refuse_special(generation.stop, tokenizer.special_texts)
    if fault:
        raise JobError(f"generation.{fault}")
    if generation.max_tokens != "context" and generation.max_tokens >= spec.context_length:
        raise JobError(
            f"generation.max_tokens is {generation.max_tokens}, but the model's context is {spec.context_length} tokens, "
            "prompt included; write a smaller number"
        )
