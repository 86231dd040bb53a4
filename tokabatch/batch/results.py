"""The results and errors files of OpenAI's batch API, made of a run's samples.

A request's rows follow one another in the order of rows, so that the samples stream by once; each line of either file has the
custom_id of a request, and each request one line in one of the two. What is not computed yet is in neither.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tokabatch.batch.job import check_targets, errors_file
from tokabatch.errors import OutputError, RowError
from tokabatch.input.batch_files import BAD_REQUEST, BODY, COLUMNS, CUSTOM_ID, PROMPT_INDEX, URL
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import ModelConfig
from tokabatch.number_text import counted
from tokabatch.openai.batch_lines import read_batch_request
from tokabatch.openai.errors import ApiError, of_row
from tokabatch.openai.requests import Request
from tokabatch.openai.responses import Answer, Echo, Head, Sample, Spell, Tokens, build_response
from tokabatch.output.export import committed_shards, open_ordered
from tokabatch.output.folder import OutputFolder
from tokabatch.output.manifest import Manifest, read_manifest, without_manifest
from tokabatch.output.plain_json import to_json
from tokabatch.output.schema import CANCELLED
from tokabatch.storage.atomic_files import DurableFiles, write_whole
from tokabatch.storage.listing import ListedFile, consistently
from tokabatch.storage.write_errors import or_else, reason

_SAMPLE_COLUMNS = (
    *("row_index", "sample_index", "status", "text", "token_ids", "finish_reason", "num_prompt_tokens", "num_cached_tokens"),
    *("logprobs", "error_code", "error_message"),
)
_CARRIED = COLUMNS[1:]


@dataclass(slots=True)
class Written:
    """What was written: requests with a result, and with an error. `pending` samples of the run are not computed yet; `model`
    answered; `models` counts what the requests name."""

    results: int = 0
    errors: int = 0
    pending: int = 0
    model: str = ""
    models: Counter[str] = field(default_factory=Counter[str])


def describe(written: Written, results: Path, errors: Path | None = None) -> str:
    """What was written, in a few lines for the user."""
    lines = [
        f"{results}: {counted(written.results, 'result')}; {errors or errors_file(results)}: {counted(written.errors, 'error')}"
    ]
    if written.pending:
        left = counted(written.pending, "sample is", "samples are")
        lines.append(f"{left} not computed yet; run the job again, then export again")
    others = {name: count for name, count in written.models.items() if name != written.model}
    if others:
        name = max(others, key=lambda name: others[name])
        what = f"the model {name!r}" if len(others) == 1 else f"{counted(len(others), 'other model')}, {name!r} most often"
        number = sum(others.values())
        named = counted(number, "request names", "requests name")
        lines.append(f"{named} {what}; {written.model} answered {'it' if number == 1 else 'them'}")
    return "\n".join(lines)


def write_results(
    path: Path, results: Path, errors: Path | None = None, *, model: str | None = None, requests: str | None = None
) -> Written:
    """Write the files of the run in the output folder `path`, in the order of the requests; both are replaced when they are
    whole, that of the errors first. `model` is what responses call the model, and `requests` what messages call the file of
    requests, unless these are the job's `model.path` and `input.path`. Raises OutputError where the run is of another kind, or
    a file cannot be written."""
    folder, errors = OutputFolder(path), errors or errors_file(results)
    manifest = read_manifest(folder)
    if manifest is None:
        raise without_manifest(folder)
    check_targets(folder, results, errors)
    lines = _Lines(manifest, model or str(manifest.job["model"]["path"]), requests)
    try:
        return consistently(lambda: _write(folder, manifest, committed_shards(folder), results, errors, lines), path)
    except OSError as error:
        raise OutputError(
            f"--to {results} cannot be written: {reason(error)}. {or_else(error, ', or name a file elsewhere', '')}"
        ) from error


def _write(
    folder: OutputFolder,
    manifest: Manifest,
    shards: Sequence[ListedFile],
    results: Path,
    errors: Path,
    lines: _Lines,
) -> Written:
    if not shards:
        raise OutputError(f"{folder.path} holds no committed samples (no data/part-*.parquet); check the path")
    written = Written(pending=manifest.samples, model=lines.model)
    with open_ordered(shards, results.absolute().parent, (*_SAMPLE_COLUMNS, *_CARRIED)) as (schema, tables, scratch):
        if missing := [name for name in _CARRIED if name not in schema.names]:
            raise OutputError(
                f"{folder.path} holds no run of an OpenAI batch file (its samples have no column {missing[0]}). Such a run has "
                "input.format: openai, and output.columns: all"
            )
        files = [scratch / "results", scratch / "errors"]
        with files[0].open("wb") as good, files[1].open("wb") as bad:
            for samples in _requests(row for table in tables for row in table.to_pylist()):
                written.pending -= len(samples)
                line = lines.line(samples, written.models)
                if line is not None:
                    failed = line["response"]["status_code"] != 200
                    (bad if failed else good).write(to_json(line).encode() + b"\n")
                    written.errors += failed
                    written.results += not failed
            for file in (good, bad):
                file.flush()
                os.fsync(file.fileno())
        if errors.absolute().parent == results.absolute().parent:
            files[1].replace(errors)
        else:
            write_whole(DurableFiles(), errors.with_name(f".{errors.name}.partial"), errors, files[1].read_bytes())
        files[0].replace(results)
    return written


def _requests(samples: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The samples of each request: those of a row that begins one, and of the rows for its further prompts."""
    held: list[Mapping[str, Any]] = []
    for sample in samples:
        begins = held and sample["row_index"] != held[-1]["row_index"]
        if begins and not (sample[PROMPT_INDEX] and sample[CUSTOM_ID] == held[0][CUSTOM_ID]):
            yield held
            held = []
        held.append(sample)
    if held:
        yield held


class _Lines:
    """Makes the line of a request from its samples."""

    def __init__(self, manifest: Manifest, model: str, requests: str | None) -> None:
        self._manifest = manifest
        self._n = int(manifest.job["generation"]["n"])
        self._created = int(datetime.fromisoformat(manifest.started).timestamp())
        self.model = model
        self._path = str(manifest.job["input"]["path"])
        self._requests = self._path if requests is None else requests
        self._fingerprint = f"fp_{manifest.fingerprint_sha256[:10]}" if manifest.fingerprint_sha256 else None
        self._tokenizer: Tokenizer | None = None
        self._spell: Spell | None = None

    def line(self, samples: Sequence[Mapping[str, Any]], models: Counter[str]) -> dict[str, Any] | None:
        """None where some of them are not there yet."""
        first = samples[0]
        if first[PROMPT_INDEX]:
            return None
        name = first[CUSTOM_ID] if first[CUSTOM_ID] is not None else f"row {first['row_index']}"
        number = hashlib.sha256(to_json([self._manifest.run, name]).encode()).hexdigest()[:24]
        request = read_batch_request(first[URL], None if first[BODY] is None else json.loads(first[BODY]))
        if isinstance(request, Request) and request.model is not None:
            models[request.model] += 1
        failed = next((sample for sample in samples if sample["status"] == "error"), None)
        if failed is not None:
            error = self._error(failed, request)
            status, body = error.status, error.body()
        else:
            assert isinstance(request, Request)
            rows: dict[int, list[Mapping[str, Any]]] = {}
            for sample in samples:
                rows.setdefault(sample["row_index"], []).append(sample)
            wanted = int(request.settings.get("n", self._n))
            if len(rows) < len(request.rows()) or any(len(each) < wanted for each in rows.values()):
                return None
            status, body = 200, self._response(request, list(rows.values()), number)
        response = {"status_code": status, "request_id": f"req_{number}", "body": body}
        return {"id": f"batch_req_{number}", CUSTOM_ID: first[CUSTOM_ID], "response": response, "error": None}

    def _error(self, sample: Mapping[str, Any], request: Request | ApiError) -> ApiError:
        # A message of a row begins with the file and its line.
        error = RowError(sample["error_code"], renamed(sample["error_message"], self._path, self._requests))
        if error.code != BAD_REQUEST:
            return of_row(error, request.prompt_field if isinstance(request, Request) else None)
        if isinstance(request, ApiError) and sample["error_message"].endswith(request.message):
            # The message of the row also says where it stands.
            return ApiError(error.message, request.param, request.code, request.status)
        # What is wrong beside the body.
        return of_row(error, CUSTOM_ID if sample[CUSTOM_ID] is None else "method")

    def _response(self, request: Request, rows: Sequence[Sequence[Mapping[str, Any]]], number: str) -> dict[str, Any]:
        head = Head(number, self._created, self.model, self._fingerprint)
        answers: list[Answer] = []
        for place, samples in enumerate(rows):
            told, echo = samples[0], None
            if request.echo:
                prompt = request.prompts[place]
                text = prompt if isinstance(prompt, str) else self._load().decode_batch([prompt], skip_special_tokens=False)[0]
                echo = Echo(text, Tokens(()))
            # A row that stopped has fewer choices than were asked for.
            made = [_sample(sample) for sample in samples if sample["status"] != CANCELLED]
            answers.append(Answer(made, told["num_prompt_tokens"], told["num_cached_tokens"] or 0, echo))
        if request.logprobs is not None and self._spell is None:
            self._spell = spelling(self._load())
        return build_response(request, answers, head, self._spell or str)

    def _load(self) -> Tokenizer:
        """The run's tokenizer."""
        if self._tokenizer is None:
            tokenizer = self._manifest.job["model"]["tokenizer"]
            self._tokenizer = load_tokenizer(ModelConfig(path=self._manifest.model_path, tokenizer=tokenizer))
        return self._tokenizer


def renamed(message: str, path: str, name: str) -> str:
    """The message with `name` for the file at `path`, which stands there whole or from the working directory on."""
    parts = Path(path).parts
    known = (str(Path(*parts[begin:])) for begin in range(len(parts)))
    return message.replace(next((each for each in known if each in message), path), name)


def spelling(tokenizer: Tokenizer) -> Spell:
    """How the tokenizer's ids read in log-probabilities; special tokens by their names."""
    pieces, special = tokenizer.piece_texts(), tokenizer.special_by_id
    return lambda token: special.get(token) or (pieces[token] if token < len(pieces) else "")


def _sample(row: Mapping[str, Any]) -> Sample:
    each: Sequence[Mapping[str, Any]] = row["logprobs"] or ()
    top = [list(zip(token["top_token_ids"], token["top_logprobs"], strict=True)) for token in each]
    return Sample(row["text"], Tokens(row["token_ids"], [token["logprob"] for token in each], top), row["finish_reason"])
