"""Prompts of a finished run made once more, to be shown: its output holds the rows they came from, but not the prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from tokabatch.input.prompts.builder import Limits, Prompt, PromptBuilder
from tokabatch.input.rows import Row
from tokabatch.input.store.row_digests import RowDigests, digest_each
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.job import Job


@dataclass(frozen=True, slots=True)
class RebuiltPrompt:
    """The text of a prompt, special tokens included, and the row's own part of it, as `PromptSource.own_part` finds it."""

    text: str
    own_part: str = ""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Prompts by row number, and the chat template that applied to them, empty if none did."""

    prompts: Mapping[int, RebuiltPrompt] = field(default_factory=dict[int, RebuiltPrompt])
    chat_template: str = ""


def job_as_run(recorded: Mapping[str, Any], working_folder: str, model_folder: str) -> Job:
    """The job that a run recorded, with the model in the folder that it was read from, and the paths that prompts depend on
    taken from the folder that the run was started in. Raises JobError for a job that this version does not accept."""
    job: dict[str, Any] = json.loads(json.dumps(recorded))
    job["model"] |= {"path": model_folder, "revision": None}
    few_shot: dict[str, Any] = job["prompt"].get("few_shot") or {}
    for section, name in (
        (job["model"], "path"),
        (job["model"], "tokenizer"),
        (few_shot, "path"),
        (job["prompt"], "chat_template"),
    ):
        with suppress(OSError):  # A template's text is too long for a path.
            if section.get(name) and (path := Path(working_folder, section[name])).exists():
                section[name] = str(path)
    return Job.load(job)


def rebuild_prompts(job: Job, rows: Mapping[int, Mapping[str, Any]], digests: RowDigests, clock: datetime) -> Rebuilt:
    """The prompts of these rows. A prompt whose token ids do not have the
    digest that the run recorded is left out: columns may be missing, or be of other types than in the input. `clock` is the
    time that templates see. Raises UsageError where the tokenizer or a file that the job names is gone."""
    tokenizer = load_tokenizer(job.model)
    limits = Limits(sys.maxsize, tokenizer.vocab_size)
    found: dict[int, RebuiltPrompt] = {}
    chat_template = ""
    for typed in (False, True):
        builder = PromptBuilder(
            job.prompt, job.generation, tokenizer, limits, typed=typed, now=clock, scores=job.mode == "score"
        )
        chat_template = builder.chat_template
        left = [Row(number, columns) for number, columns in rows.items() if number not in found and number < len(digests)]
        for built in builder.build(left):
            if isinstance(built, Prompt):
                ids = np.concatenate((built.token_ids, *built.continuations))
                if digest_each([ids.tobytes()])[0] == digests.prompt[built.row_index]:
                    (text,) = tokenizer.decode_batch([built.token_ids.tolist()], skip_special_tokens=False)
                    own = "" if built.scored_whole else builder.own_part(rows[built.row_index])
                    found[built.row_index] = RebuiltPrompt(text, own)
    return Rebuilt(found, chat_template)
