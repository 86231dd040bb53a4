"""The section `verify`: its keys, and the verifiers that `verify.kind` can name."""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from tokabatch.errors import JobError
from tokabatch.job import fields
from tokabatch.job.keys import Section

_VERIFIERS = Path(__file__).parent.parent / "scoring" / "verifiers"
_PYTHON = ".py"
_OWN_JUDGE = re.compile(r".+\.py(:[A-Za-z_]\w*)?|[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.DOTALL)
_WITHOUT_ANSWER = ("code", "regex")
_BESIDE = {"code": {"allow_code_execution": "true"}, "regex": {"options": '{pattern: "answer is ([0-9]+)"}'}}
"""Which other keys an example of a kind needs, if not `answer` alone."""


class StopConfig(Section):
    """Stop sampling a row once its verdicts suffice; give one of the two. Verdicts are read in the order of the sample
    numbers, so where a row stops is the same on any hardware and after any restart; its further samples are rows of status
    `cancelled`. Samples begin in waves (4, 8, 16, ...) as verdicts come in."""

    after_correct: fields.OptionalCount = Field(default=None, description="Stop a row after this many correct samples.")
    majority: fields.OptionalCount = Field(
        default=None,
        description="Stop a row once this many of its samples agree on an answer (the judge's column `extracted`).",
    )

    @model_validator(mode="after")
    def _one(self) -> StopConfig:
        if (self.after_correct is None) == (self.majority is None):
            given = "takes one of the two" if self.majority else "needs `after_correct` or `majority`"
            raise ValueError(f"{given}, for example {{after_correct: 1}}")
        return self


class VerifyConfig(Section):
    """Judge each sample: adds the columns `correct`, `verify_score` and `verify_error`, and pass@k to the summary. Judges have
    processes of their own, beside the run."""

    kind: fields.Verifier = Field(
        description="Name of a verifier, or your own: ./my_judge.py, ./my_judge.py:grade or package.module:grade."
    )
    answer: fields.OptionalColumn = Field(
        examples=["answer"], default=None, description="Column that holds the reference answer."
    )
    options: fields.Options = Field(default={}, description="Further arguments of the function, by name.")
    correct_from: fields.Number = Field(default=1.0, description="A score of at least this counts as correct.")
    processes: fields.AutoCount = Field(
        examples=["4"], default="auto", description="Maximum number of judge processes; auto: half of the CPU cores."
    )
    seconds: fields.Seconds = Field(
        default=10.0, description="Time limit of a verdict; one that takes longer is null, and its process is replaced."
    )
    memory_bytes: fields.Bytes = Field(default=4 << 30, description="Limit on the address space of a judge process, on Linux.")
    stop: StopConfig | None = None
    allow_code_execution: fields.Flag = Field(
        default=False,
        description="Required by kind `code`, which runs the model's output with limits on time and memory, but as your user.",
    )

    @classmethod
    def example(cls, first: str | None = None) -> dict[str, str]:
        kind = first or "exact"
        return {"kind": kind, **_BESIDE.get(kind, {} if kind not in verifier_names() else {"answer": "answer"})}

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        names = verifier_names()
        if kind in names or _OWN_JUDGE.fullmatch(kind):
            return kind
        nearest = get_close_matches(kind, names, n=1)
        hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
        raise ValueError(
            f"there is no verifier `{kind}`{hint} (there are: {', '.join(names)}; name your own function as "
            f"FILE{_PYTHON}, FILE{_PYTHON}:FUNCTION or MODULE:FUNCTION)"
        )

    @model_validator(mode="after")
    def _complete(self) -> VerifyConfig:
        if self.kind in verifier_names() and self.answer is None and self.kind not in _WITHOUT_ANSWER:
            raise ValueError(f"kind {self.kind} needs `answer`, the column that holds the reference answer; add it")
        if self.kind == "code" and not self.allow_code_execution:
            raise ValueError(
                "kind code runs the model's output as your user: with limits on time and memory, but it can read and delete "
                "your files and use the network. Run tokabatch in a container of its own, and set "
                "verify.allow_code_execution to true"
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """Return what the verdicts depend on, besides the judge's source. Newer keys are included only if they are used, so
        that runs from before those keys remain the same job."""
        values = self.model_dump(mode="json")
        newer = {
            name: values[name]
            for name in ("options", "correct_from")
            if values[name] != VerifyConfig.model_fields[name].default
        }
        if self.stop is not None:
            newer["stop"] = values["stop"]
        return {"kind": self.kind, "answer": self.answer, **newer}


def verifier_names() -> tuple[str, ...]:
    """Return the names of all verifiers: one for each file of the folder, none of them imported."""
    return tuple(sorted(path.stem for path in _VERIFIERS.glob("*.py") if not path.stem.startswith("_")))


def verifier_path(kind: str) -> Path:
    """Return the source file of the verifier that `verify.kind` names. Imports nothing: judges are not loaded into this
    process. Raises JobError for a module that does not exist."""
    source = kind.partition(":")[0]
    if source.endswith(_PYTHON):
        return Path(source)
    if kind in verifier_names():
        return _VERIFIERS / f"{kind}{_PYTHON}"
    places: list[str] | None = [os.getcwd(), *sys.path]
    origin: str | None = None
    for end in [place for place, letter in enumerate(source) if letter == "."] + [len(source)]:
        found = PathFinder.find_spec(source[:end], places) if places else None
        places, origin = (None, None) if found is None else (list(found.submodule_search_locations or ()), found.origin)
    if origin is None:
        raise JobError(f"verify.kind: {kind}: there is no module {source} here or among the installed ones; give a file's path")
    return Path(origin)
