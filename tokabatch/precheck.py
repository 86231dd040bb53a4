"""What can be refused of a job before torch and transformers are imported, which takes seconds: paths, the model's config.json,
templates, the columns of the first rows.

All of it is checked again, by the same functions, where the job is prepared (`workload.prepare`); what needs the tokenizer, the
weights or the whole input is refused there.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokabatch.errors import InputError, JobError
from tokabatch.input.batch_files import open_rows, settle_format
from tokabatch.input.fingerprint import describe
from tokabatch.input.generation_defaults import effective_generation
from tokabatch.input.prompts.chat_template import (
    chat_template_file,
    choose_chat_template,
    is_jinja,
    refuse_missing_chat_template,
)
from tokabatch.input.prompts.columns import PromptColumns, check_columns, check_first_rows
from tokabatch.input.prompts.few_shot import render_few_shot
from tokabatch.input.prompts.row_settings import refuse_beyond, refuse_beyond_context
from tokabatch.input.prompts.sources import SAMPLING_PARAMS
from tokabatch.input.readers import is_of_files, list_local_files
from tokabatch.input.rows import NO_PLACES, Row, RowPlaces, no_judged_row, no_rows
from tokabatch.input.tokenizer.files import TOKENIZER_JSON, has_no_chat_template, tokenizer_folder
from tokabatch.job import FP8_NEEDS, EngineConfig, Job, ModelConfig, fp8_key, verifier_names, verifier_path
from tokabatch.job.engine_limits import least_pages, refuse_limits, refuse_small_cache
from tokabatch.model.checkpoint import read_checkpoint
from tokabatch.model.families import read_spec
from tokabatch.model.file_digests import known_files
from tokabatch.model.foreign_files import refuse_pointer
from tokabatch.model.resolve import resolve_model
from tokabatch.model.spec import ModelSpec
from tokabatch.output.folder import OutputFolder
from tokabatch.output.probe import check_output
from tokabatch.output.same_job import find_run
from tokabatch.output.schema import verdict_fields
from tokabatch.scoring.early_stopping import refuse_majority
from tokabatch.scoring.judge_process import Request
from tokabatch.scoring.pool import JudgeLost, JudgeProcess, judge_spec

_DEVICE_FILES = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")
"""In /dev, wherever there is a GPU: by drivers of NVIDIA's, on its small boards, on Windows (WSL), by AMD's."""
_CUDA = "libcuda.so.1"
"""What torch's CUDA runtime loads; installed with the driver."""
_NO_GPU = f"this machine has no driver of a GPU ({_CUDA})"
_WHERE_GPUS = "A container sees GPUs if started with them (docker: --gpus all, apptainer: --nv); login nodes often have none"
_MOST_FILES = 64
"""Of an input whose columns are looked at; the footers of many Parquet files take longer than it is worth."""


def refuse_model(model: ModelConfig) -> tuple[ModelSpec, Path, Path]:
    """What the model's config.json says, and the folders of the model and of its tokenizer. Raises the ModelError of a model or
    tokenizer that is not there, is of no known family, or whose files are not whole."""
    folder = resolve_model(model.path, model.revision, weights=False)
    spec = read_spec(folder)
    if Path(model.path).expanduser().is_dir():
        read_checkpoint(folder)
    tokenizer = folder
    if model.tokenizer is not None:
        tokenizer = resolve_model(model.tokenizer, weights=False, key="model.tokenizer")
    if (local := tokenizer_folder(model)) is not None:
        refuse_pointer(local / TOKENIZER_JSON)
    return spec, folder, tokenizer


def has_no_gpu() -> bool:
    """Whether torch certainly finds no GPU: on Linux, without a driver's device files and CUDA's library."""
    if sys.platform != "linux" or any(next(Path("/dev").glob(pattern), None) for pattern in _DEVICE_FILES):
        return False
    try:
        ctypes.CDLL(_CUDA)
    except OSError:
        return True
    return False


def refuse_without_gpu(model: ModelConfig, engine: EngineConfig) -> None:
    """Raise JobError if the settings need a GPU and there certainly is none."""
    if (engine.device != "cuda" and fp8_key(model, engine) is None) or not has_no_gpu():
        return
    if engine.device == "cuda":
        raise JobError(f"engine.device is cuda, but {_NO_GPU}; write auto or cpu. {_WHERE_GPUS}")
    raise JobError(f"{fp8_key(model, engine)} {FP8_NEEDS}: {_NO_GPU}. {_WHERE_GPUS}")


def refuse_missing_files(job: Job) -> None:
    """Raise JobError for a file that the job names and that is not there, where no other check opens it; also if what was read
    from it earlier is in the output folder. A `prompt.chat_template` is a file if it looks like one: names have no suffix."""
    template = None if job.prompt.token_ids or chat_template_file(job.prompt) else job.prompt.chat_template
    if template is not None and not is_jinja(template) and ("/" in template or Path(template).suffix[1:].isalpha()):
        raise JobError(f"prompt.chat_template: there is no file {template!r} in {Path.cwd()}; check the path")
    if job.trace is not None:
        trace = Path(job.trace.path)
        # The run creates its own folder.
        is_placed = trace.absolute().parent.is_dir() or trace.absolute().parent == Path(job.output.path).absolute()
        if trace.is_dir() or not is_placed:
            fault = "is a folder" if trace.is_dir() else "is in a folder that does not exist"
            raise JobError(f"trace.path {job.trace.path!r} {fault}; name a file in a folder that exists, such as trace.json.gz")
    if job.engine.profile is not None and not Path(job.engine.profile).is_file():
        raise JobError(
            f"engine.profile: there is no file {job.engine.profile!r} in {Path.cwd()}; make one from a finished run with "
            "`tokabatch profile OUT --to profile.json`, or leave engine.profile out"
        )


def refuse_early(
    job: Job, *, shared: bool = False, overwrite: bool = False, retry_errors: bool = False, absent_gpu: bool = False
) -> None:
    """Raises the UsageError in which the job would end seconds later. Writes nothing; reads the first rows of files of this
    machine alone, and of a model on the hub the small files, which stay in the cache. `shared`: others may write there;
    `overwrite`, `retry_errors`: as the run reuses what is there; `absent_gpu`: it is planned for a GPU of another machine."""
    if shared:
        job.refuse_sharing()
    if not absent_gpu:
        refuse_without_gpu(job.model, job.engine)
    check_output(Path(job.output.path), shared=shared, overwrite=overwrite)
    if job.verify is not None:
        verifier = verifier_path(job.verify.kind)
        if not verifier.is_file():
            raise JobError(f"verify.kind: there is no file {verifier} in {Path.cwd()}; check the path")
    # In a process of its own, which is there in a fraction of the time that torch takes.
    with nullcontext() if job.verify is None else closing(JudgeProcess(judge_spec(job.verify))) as judge:
        if job.verify is not None and judge is not None:
            verdict_fields(judge.loaded.columns)
            refuse_majority(job.verify, judge.loaded.columns)
        _refuse_model_and_rows(job, judge, shared=shared, overwrite=overwrite, retry_errors=retry_errors)


def _refuse_model_and_rows(job: Job, judge: JudgeProcess | None, *, shared: bool, overwrite: bool, retry_errors: bool) -> None:
    spec, folder, tokenizer = refuse_model(job.model)
    refuse_beyond_context(job.generation, spec.context_length)
    refuse_limits(job.engine, spec.context_length)
    # Words are token ids only behind the tokenizer.
    if fault := refuse_beyond(job.generation.model_copy(update={"bad_words": []}).params(), spec.vocab_size):
        raise JobError(f"generation.{fault}")
    if tokenizer_folder(job.model) is not None and has_no_chat_template(tokenizer):
        name = job.model.tokenizer or job.model.path
        if choose_chat_template(job.prompt, {}, name) is None:
            refuse_missing_chat_template(job.prompt, name)
    refuse_missing_files(job)
    columns = PromptColumns(job.prompt)
    if job.prompt.few_shot is not None:
        few_shot = job.prompt.few_shot
        render_few_shot(few_shot.path, few_shot.k, few_shot.template)
    files = list_local_files(job.input)
    if files is None and is_of_files(job.input, "jsonl"):
        return
    given, job = job, settle_format(job)
    try:
        few = files is not None and len(files) <= _MOST_FILES
        first = _check_columns(job, columns) if few else _FirstRows()
    except InputError as error:
        if job.input.format != "openai" or given.input.format == "openai":
            raise
        raise InputError(
            f"{error}. By its first line, it is a batch file of OpenAI's API; write input.format: rows if it is not"
        ) from error
    generation = effective_generation(job, folder)[0]
    of_job = first.all_names and SAMPLING_PARAMS not in first.names and job.input.format != "openai" and job.mode == "generate"
    output = 1 if not of_job else generation.max_tokens if generation.max_tokens != "context" else spec.context_length - 1
    refuse_small_cache(job.engine, least_pages(1 + output, job.engine.page_size))
    how = {"retry_errors": retry_errors, "replaceable": not shared}
    earlier = None if overwrite else find_run(OutputFolder(Path(job.output.path)), **how)
    if earlier is not None:
        # The weights, which take long to read, are compared where they are opened.
        marks = {file.name: file.mark for file in known_files(folder, tokenizer, weights=False)}
        dtype = None if job.model.dtype == "auto" else job.model.dtype
        earlier.compare(describe(job, generation, marks, dtype=dtype))
        earlier = None if earlier.worthless else earlier
    if earlier is None:
        _refuse_unjudged(job, first, judge)
    if earlier is not None and job.input.limit is not None and job.input.format != "openai":
        earlier.compare_limit(job.input.limit)
    if earlier is not None and first.names and SAMPLING_PARAMS not in first.names:
        earlier.compare_n(job.generation.n)


@dataclass(frozen=True, slots=True)
class _FirstRows:
    """What was read of the input: names of columns, and rows. `all_names` and `all_rows`: there are no others."""

    names: Collection[str] = ()
    all_names: bool = False
    rows: Sequence[Row] = ()
    all_rows: bool = False
    places: RowPlaces = NO_PLACES


def _check_columns(job: Job, columns: PromptColumns) -> _FirstRows:
    """Read the first rows; of files with a schema only if they are judged. Raises UsageError for columns that the job needs and
    that are not there."""
    reader = open_rows(job.input)
    if reader.schema is not None:
        check_columns(job, columns, reader.schema.names)
        if job.verify is None:
            return _FirstRows(reader.schema.names, all_names=True)
    batches = list(islice(reader.batches(), 2))
    if not any(batch.rows for batch in batches):
        raise no_rows(reader.name)
    rows = [row for batch in batches[:1] for row in batch.rows][: job.input.limit]
    whole = len(batches) == 1 or len(rows) == job.input.limit
    if reader.schema is not None:
        return _FirstRows(reader.schema.names, all_names=True, rows=rows, all_rows=whole)
    names = {name for row in rows if row.error is None for name in (*(row.columns or ()), *row.prompt_columns)}
    if names and whole:
        check_columns(job, columns, names)
    elif names:
        check_first_rows(columns, names, len(rows))
    return _FirstRows(names, all_names=whole, rows=rows, all_rows=whole, places=RowPlaces(batches[0].begins))


def _refuse_unjudged(job: Job, first: _FirstRows, judge: JudgeProcess | None) -> None:
    """Raise JobError if a verifier of the package can judge none of the rows and all were read. Judges of one's own see the
    rows as the output has them, where the job is prepared."""
    read = [row for row in first.rows if row.columns is not None and row.error is None]
    if job.verify is None or judge is None or job.verify.kind not in verifier_names() or not read or not first.all_rows:
        return
    faults: list[str] = []
    with suppress(JudgeLost):
        # Most often the first one can be judged: it is sent alone.
        for rows in (read[:1], read[1:]):
            for answers in judge.ask(Request([row.columns or {} for row in rows]), job.verify.seconds):
                faults += [each for each in answers if each is not None]
                if None in answers:
                    return
        raise no_judged_row(first.places.name(read[0].index), faults[0])
