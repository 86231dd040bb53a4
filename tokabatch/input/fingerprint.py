"""What decides a run's output: only the same job may continue a folder's run, and a difference can be shown.

Included: the model's and the tokenizer's files, how prompts are made, how samples are drawn, what an output row holds, the
verifier's source, the input's rows and the token ids of their prompts. Not included: `generation.n`, rows appended to the
input, the versions of libraries (a change of prompts shows in their tokens), and the section `engine` except for the cache's
type: samples depend on those only by rounding. Files are compared by size and digest, rows by digests of their content,
whatever file they are in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokabatch.input.prompts.chat_template import chat_template_file
from tokabatch.input.prompts.few_shot import render_few_shot
from tokabatch.input.readers import list_files
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.input.verifier_files import verifier_files
from tokabatch.job import GenerationConfig, Job, VerifyConfig
from tokabatch.number_text import counted

WEIGHTS, WEIGHT_INDEX = ".safetensors", ".safetensors.index.json"
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "bad_words")
UNKNOWN = ""
"""Stands for a setting that is not known yet; no setting is the empty text."""
_SHOWN = 60
_FILE_MARK = re.compile(r'"?([0-9,]+ bytes?), sha256 [0-9a-f]{64}"?')
_JUDGE = "verifier/"
_PLAIN = re.compile(r"(?!(?i:true|false|null)$)[A-Za-z_./][\w./:-]*(?<!:)", re.ASCII)
"""Text that needs no quotes in an override, nor in a mapping of YAML."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`settings` are texts by name; the `rows` rows of the input have the digest `rows_sha256`, the token ids of their prompts
    the digest `prompts_sha256`. `input_bytes` (sizes by path) are for messages only. A run may have more rows than the one it
    continues."""

    settings: Mapping[str, str]
    input_bytes: Mapping[str, int]
    rows: int = 0
    rows_sha256: str = ""
    prompts_sha256: str = ""

    def with_rows(self, digests: RowDigests) -> Fingerprint:
        """Return the same job with its rows."""
        return replace(self, rows=len(digests), rows_sha256=digests.content_sha256, prompts_sha256=digests.prompt_sha256)


def describe(
    job: Job,
    generation: GenerationConfig,
    files: Mapping[str, str],
    eos_token_ids: tuple[int, ...] | None = None,
    dtype: str | None = None,
) -> Fingerprint:
    """Describe everything but the rows. `generation` has the model's defaults filled in; `files` maps the model's and the
    tokenizer's files to what they hold, weights possibly missing. `dtype` is the type computed in. None: not known yet."""
    settings = dict(files)
    prompt = job.prompt.model_dump(mode="json", exclude={"continuations"} if job.mode == "generate" else None)
    # Runs from before these keys and penalties existed can be continued without them.
    prompt = {name: value for name, value in prompt.items() if value or not name.startswith("chat_template")}
    if file := chat_template_file(job.prompt):
        prompt["chat_template"] = _mark(file.read_bytes())
    if few_shot := job.prompt.few_shot:
        prompt["few_shot"] = _mark(render_few_shot(few_shot.path, few_shot.k, few_shot.template).encode())
    neutral = {name for name in PENALTIES if getattr(generation, name) == GenerationConfig.model_fields[name].default}
    split = job.output.split_reasoning
    drawn = generation.model_dump(mode="json", exclude={"n", *neutral}) | {"end tokens": eos_token_ids}
    sections: dict[str, Mapping[str, Any]] = {
        "model": {"dtype": dtype, "quantization": job.model.quantization},
        "engine": {"kv_cache_dtype": job.engine.kv_cache_dtype},
        "input": {"id_column": job.input.id_column},
        "prompt": prompt,
        "generation": drawn,
        "output": {"columns": job.output.columns, **({"split_reasoning": split} if split else {})},
        "job": {"mode": job.mode} if job.mode != "generate" else {},
    }
    for section, values in sections.items():
        settings |= {f"{section}.{name}": json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    later = {"model.dtype": dtype, "generation.end tokens": eos_token_ids}
    settings |= {name: UNKNOWN for name, value in later.items() if value is None}
    if job.verify is not None:
        settings |= verify_settings(job.verify)
    return Fingerprint(settings, list_files(job.input))


def verify_settings(verify: VerifyConfig) -> dict[str, str]:
    """Return what the verdicts depend on, including the judge's source and what it imports from its folder."""
    keys = {f"verify.{name}": json.dumps(value, ensure_ascii=False) for name, value in verify.decisive().items()}
    return {f"{_JUDGE}{name}": _mark(content) for name, content in verifier_files(verify.kind).items()} | keys


def verify_overrides(earlier: Fingerprint, now: Fingerprint) -> list[str]:
    """Return the overrides that judge a folder of `earlier` as `now` does; empty if `now` judges nothing."""
    named = {name: json.loads(value) for name, value in now.settings.items() if name.startswith("verify.")}
    # Without what is null then and now.
    values = {name: value for name, value in named.items() if value is not None or earlier.settings.get(name) != "null"}
    if not values:
        return []
    gone = {
        name: VerifyConfig.model_fields[name.removeprefix("verify.")].default
        for name in earlier.settings.keys() - named.keys()
        if name.startswith("verify.")
    }
    return [f"{name}={_written(value)}" for name, value in (values | gone | _consent(values)).items()]


def verify_section(settings: Mapping[str, str]) -> str:
    """Return, as one line of YAML, the section of a job that judges as these settings of a fingerprint do; empty if they judge
    nothing."""
    named = {name: json.loads(value) for name, value in settings.items() if name.startswith("verify.")}
    values = {name: value for name, value in (named | _consent(named)).items() if value is not None}
    listed = ", ".join(f"{name.removeprefix('verify.')}: {_written(value)}" for name, value in values.items())
    return f"verify: {{{listed}}}" if values else ""


def _consent(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"verify.allow_code_execution": True} if values.get("verify.kind") == "code" else {}


def _written(value: Any) -> str:
    """Write a value as in an override or in YAML."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def is_of_verify(name: str) -> bool:
    """Return whether a setting is one of `verify_settings`."""
    return name.startswith(("verify.", _JUDGE))


def changed_settings(earlier: Fingerprint, now: Fingerprint) -> list[str]:
    """Return a line for each setting or file that differs. What is not known yet is not compared, nor are weights that are
    not downloaded."""
    weights_here = any(name.endswith(WEIGHTS) for name in now.settings)
    names = dict.fromkeys((*now.settings, *earlier.settings))
    compared = [name for name in names if weights_here or not name.endswith((WEIGHTS, WEIGHT_INDEX))]
    differs = [name for name in compared if now.settings.get(name) not in (UNKNOWN, earlier.settings.get(name))]
    # Another judge has other files.
    named = [name for name in differs if not (name.startswith(_JUDGE) and "verify.kind" in differs)]
    return [_difference(name, earlier.settings.get(name), now.settings.get(name)) for name in named]


def changed_sizes(earlier: Fingerprint, now: Fingerprint) -> list[str]:
    """Return a line for each input file whose size differs."""
    return [
        f"{name}: {_size(earlier.input_bytes.get(name))} then, {_size(now.input_bytes.get(name))} now"
        for name in dict.fromkeys((*earlier.input_bytes, *now.input_bytes))
        if earlier.input_bytes.get(name) != now.input_bytes.get(name)
    ]


def _difference(name: str, then: str | None, now: str | None) -> str:
    """Describe one setting that differs, or one file, by its size alone."""
    if name.startswith(_JUDGE):
        name = f"verify.kind: {name.removeprefix(_JUDGE)}"
    marks = [_FILE_MARK.fullmatch(value) for value in (then or "", now or "")]
    if marks[0] and marks[1]:
        sizes = [mark[1] for mark in marks if mark]
        return f"{name} has changed ({f'{sizes[0]} then, {sizes[1]} now' if sizes[0] != sizes[1] else sizes[0]})"
    then, now = (mark[1] if mark else _shown(value) for mark, value in zip(marks, (then, now), strict=True))
    return f"{name}: {then} then, {now} now"


def _mark(content: bytes) -> str:
    return f"{counted(len(content), 'byte')}, sha256 {hashlib.sha256(content).hexdigest()}"


def _shown(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _SHOWN else f"{value[: _SHOWN - 1]}…"


def _size(size: int | None) -> str:
    return "absent" if size is None else counted(size, "byte")
