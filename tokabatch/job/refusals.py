"""Why a model refused its values, in words: the key, what was given, what is accepted, and what to write instead.

Turns pydantic's errors into one sentence per key. `load` finds where each key was written; `Refusal.in_file` and
`Refusal.in_override` put that in front.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tokabatch.job.document import Path
from tokabatch.job.keys import Section, accepts_of, field_at, in_braces, list_keys, section_of
from tokabatch.job.names_elsewhere import hub_dataset, our_name, our_value, why_none
from tokabatch.job.scalars import write_value

_SHOWN = 60
_ROWS = frozenset(("rows", "data", "dataset", "df", "prompts", "texts", "inputs", "questions", "examples", "files", "paths"))
"""Keys that programs use for rows, or for several files of them."""
_OF_FILES = (".jsonl", ".parquet", ".json", ".csv", ".gz", ".zst")
PYTHON_NONE = "None is a text in YAML; write null"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One problem. `path` leads to the key; `suggestion` is the dotted key that was probably meant, if any; `example` is an
    accepted value, if the value is at fault."""

    path: Path
    message: str
    suggestion: str | None = None
    example: str | None = None

    @property
    def key(self) -> str:
        return dotted(self.path)

    def in_file(self, where: str) -> str:
        """Phrase the refusal of a value at `where` in a job file, with the remedy in the file's notation."""
        remedy = ""
        if self.suggestion:
            section, _, word = self.suggestion.rpartition(".")
            remedy = f"; did you mean `{word if section == dotted(self.path[:-1]) else self.suggestion}`?"
        elif self.example is not None:
            word = next(part for part in reversed(self.path) if isinstance(part, str))
            remedy = f", for example `{word}: {self.example}`"
        # A problem between two sections has no key of its own.
        subject = f"{self.key}: " if self.key else ""
        return f"{where}: {subject}{self.message}{remedy}"

    def in_override(self, override: str, model: type[BaseModel]) -> str:
        """Phrase the refusal of an override `key=value` of a key of `model`, with the remedy as an override."""
        key, _, value = override.partition("=")
        subject = "" if key.strip() == self.key else f"{self.key}: "
        if self.suggestion:
            inside = self.key.startswith(f"{key.strip()}.")
            behind = key.strip().removeprefix(self.key)
            known = field_at(model, tuple(f"{self.suggestion}{behind}".split("."))) is not None
            meant = self.suggestion.rpartition(".")[2] if inside else f"{self.suggestion}{behind}={value}"
            meant = meant if inside or known else self.suggestion
            return f"override `{override}`: {subject}{self.message}; did you mean `{meant}`?"
        # An item of a list is given with its whole list.
        whole = dotted(tuple(takewhile(lambda part: isinstance(part, str), self.path)))
        remedy = f", for example `{shlex.quote(f'{whole}={self.example}')}`" if self.example is not None else ""
        return f"override `{override}`: {subject}{self.message}{remedy}"


def refusals_of(model: type[BaseModel], error: ValidationError, values: Any) -> Iterator[Refusal]:
    """Iterate over one refusal for each key at fault, in pydantic's order; `values` were validated."""
    seen: set[Path] = set()
    for details in error.errors(include_url=False, include_context=True):
        path, owner = _locate(model, details["loc"])
        path = _as_written(path, values)
        if path not in seen:
            seen.add(path)
            yield _refusal(model, owner, path, details, values)


def row_message(model: type[BaseModel], error: ValidationError, values: Mapping[str, Any]) -> str:
    """Phrase the refusals of one row's settings in one line."""
    parts: list[str] = []
    for refusal in refusals_of(model, error, values):
        hint = f"; did you mean `{refusal.suggestion}`?" if refusal.suggestion else ""
        parts.append(f"sampling_params{'.' if refusal.key else ''}{refusal.key}: {refusal.message}{hint}")
    return "; ".join(parts)


def dotted(path: Path) -> str:
    """Write `("generation", "stop", 0)` as `generation.stop[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[Path, type[BaseModel]]:
    """Return pydantic's location without its union branches, as a path in the values, and the model that it ends in."""
    path: list[str | int] = []
    owner = model
    for depth, part in enumerate(loc):
        path.append(part)
        info = owner.model_fields.get(str(part))
        if info is None:
            break
        section = section_of(info.annotation)
        if section is None:
            path += [index for index in loc[depth + 1 :] if isinstance(index, int)]
            break
        owner = section
    return tuple(path), owner


def _as_written(path: Path, values: Any) -> Path:
    """Drop an index into a value that was given in place of a list of one."""
    for depth in range(len(path)):
        above = _lookup(values, path[:depth])
        if isinstance(path[depth], int) and not isinstance(above, list | tuple | Mapping):
            return path[:depth]
    return path


def _refusal(model: type[BaseModel], owner: type[BaseModel], path: Path, details: ErrorDetails, values: Any) -> Refusal:
    if details["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown_key(model, owner, path, _lookup(values, path[:-1]))
    if details["type"] == "value_error":
        return Refusal(path, str(details["ctx"]["error"]))  # pyright: ignore[reportTypedDictNotRequiredAccess]
    keys = [part for part in path if isinstance(part, str)]
    info = field_at(model, keys)
    assert info is not None, path
    accepts = accepts_of(info)
    if details["type"] == "missing":
        return Refusal(path, f"missing; accepts {accepts.what}", example=accepts.example)
    given = _lookup(values, path)
    if isinstance(given, str) and given == "None" and len(keys) == len(path) and not info.is_required():
        return Refusal(path, PYTHON_NONE)
    if ours := our_value(path, given) or _in_a_file(path, given):
        return Refusal(path, f"got {_describe(given)}; write {ours}")
    wants_text = details["type"] == "string_type" and isinstance(given, bool | int | float)
    quotes = " (text that looks like a number or true/false needs quotes)" if wants_text else ""
    example, needs = _as_section(section_of(info.annotation), given) or (accepts.example, "")
    return Refusal(path, f"got {_describe(given)}; accepts {accepts.what}{quotes}{needs}", example=example)


def _in_a_file(path: Path, given: Any) -> str | None:
    """What to write in place of rows or a function that a Python program gives as they are; None for other values."""
    if dotted(path) in ("verify", "verify.kind") and callable(given):
        return "the function to a file, as `verify(text, row)`, and name the file: `verify: {kind: ./judge.py}`"
    return _rows_in_a_file(given) if dotted(path) in ("input", "input.path") else None


def _rows_in_a_file(given: Any) -> str | None:
    """What to write in place of rows that a Python program gives as they are; None for values that hold none."""
    rows = cast("list[Any]", given) if isinstance(given, list | tuple) else []
    texts = [row for row in rows if isinstance(row, str)]
    if len(texts) > 1 and all(text.endswith(_OF_FILES) or "*" in text for text in texts):
        return "one path: a folder that holds the files, or a pattern such as data/*.jsonl"
    if hasattr(given, "columns"):
        frame = "df"
    elif len(texts) > 1 and len(texts) == len(rows):
        frame = 'pandas.DataFrame({"prompt": texts})'
    elif any(isinstance(row, Mapping) for row in rows) or hasattr(given, "__next__"):
        frame = "pandas.DataFrame(rows)"
    else:
        return None
    return (
        f'the rows to a file, such as {frame}.to_json("rows.jsonl", orient="records", lines=True), and name the file: '
        "`input: {path: rows.jsonl}`"
    )


_NOT_TEXT = frozenset({"true", "false", "yes", "no", "on", "off", "null", ".inf", ".nan"})
"""Words that YAML does not read as text."""


def _as_section(section: type[BaseModel] | None, given: Any) -> tuple[str, str] | None:
    """A value given in place of a section, as the section with its required key or its first one, and what must stand beside
    that; None if that key does not take it."""
    if isinstance(given, list) and len(cast("list[Any]", given)) == 1:
        given = given[0]
    if section is None or not isinstance(given, str | int | float):
        return None
    assert issubclass(section, Section)
    fields = section.model_fields
    pair = re.fullmatch(r"\s*(\w+)\s*=\s*([^=]*[^=\s])\s*", given) if isinstance(given, str) else None
    if pair and pair[1] in fields:
        is_plain = re.fullmatch(r"-?[\w.][\w./-]*", pair[2])
        return in_braces({pair[1]: pair[2] if is_plain else json.dumps(pair[2], ensure_ascii=False)}), ""
    name = next(iter(section.example()))
    if isinstance(given, str) and given.isidentifier() and "{{" in accepts_of(fields[name]).example:
        given = f"{{{{ {given} }}}}"
    needs = ""
    try:
        section.model_validate({name: given})
    except ValidationError as error:
        faults = error.errors()
        if any(details["loc"] == (name,) for details in faults):
            return None
        needs = "".join(f"; {details['ctx']['error']}" for details in faults if details["type"] == "value_error")  # pyright: ignore
    is_text = isinstance(given, str) and (not re.fullmatch(r"[A-Za-z.][\w./-]*", given) or given.lower() in _NOT_TEXT)
    return in_braces(section.example(json.dumps(given, ensure_ascii=False) if is_text else write_value(given))), needs


def _unknown_key(model: type[BaseModel], owner: type[BaseModel], path: Path, given: Mapping[str, Any]) -> Refusal:
    """`given` is the section that has the key."""
    word = our_name(path)
    prefix = dotted(path[:-1])
    value = _lookup(given, path[-1:])
    if path[-1] in _ROWS and prefix in ("", "input") and (rows := _rows_in_a_file(value)):
        return Refusal(path, f"unknown key; write {rows}")
    if word == "input.path" and isinstance(value, str) and re.fullmatch(r"[\w.-]+/[\w-]+", value):
        return Refusal(path, f"unknown key; a dataset of the hub is named by input.path: {hub_dataset(value)}")
    if word.isdecimal():
        return Refusal(path, "unknown key; a comma ends a value between { and }: write a number without one, as 1000 or 0.7")
    named, equals, value = word.partition("=")
    if equals and named.strip() in owner.model_fields:
        return Refusal(
            path, f"unknown key; inside a mapping, a colon and a space stand behind a key: `{named.strip()}: {value.strip()}`"
        )
    if word != word.strip():
        sign = word[0] if word[0].isspace() else word[-1]
        return Refusal(path, f"unknown key; the space beside it is U+{ord(sign):04X}; write ordinary ones")
    if ":" in word:
        name, _, value = word.partition(":")
        rest = f": {given[word]}" if value.startswith("{") and isinstance(given.get(word), str) else ""
        return Refusal(path, f"unknown key; write a space behind the colon: `{name}: {value.strip()}{rest}`")
    written = re.fullmatch(r"(\w+)(?: +| *(?=\{))(.+)", word)
    if written and (written[2].startswith("{") or written[1] in owner.model_fields):
        value = f"{written[2]}: …}}" if written[2].startswith("{") else written[2]
        return Refusal(path, f"unknown key; a colon is missing behind {written[1]}: write `{written[1]}: {value}`")
    everywhere = [key.name for key in list_keys(model)]
    if "." in word and f"{prefix}.{path[-1]}".strip(".") in everywhere:
        *sections, last = str(path[-1]).split(".")
        return Refusal(
            path, f"unknown key; write `{''.join(f'{each}: {{' for each in sections)}{last}: …{'}' * len(sections)}`"
        )
    elsewhere = [name for name in everywhere if word in (name, name.rpartition(".")[2])]
    siblings = list(owner.model_fields)
    close = get_close_matches(word, siblings)
    # Two letters that changed places weigh less than one that is missing: `modle` is `model`, not `mode`.
    near = [name for name in close if sorted(name) == sorted(word)] or close
    if reason := why_none(path):
        return Refusal(path, f"unknown key; {reason}")
    if prefix and word in model.model_fields:
        return Refusal(path, "unknown key", suggestion=word)
    if len(elsewhere) > 1:
        return Refusal(path, f"unknown key; there are {', '.join(f'`{name}`' for name in elsewhere)}")
    if elsewhere:
        return Refusal(path, "unknown key", suggestion=elsewhere[0])
    if near:
        return Refusal(path, "unknown key", suggestion=f"{prefix}.{near[0]}" if prefix else near[0])
    last_words = {name.rpartition(".")[2]: name for name in everywhere}
    if far := get_close_matches(word, last_words, n=1, cutoff=0.75):
        return Refusal(path, "unknown key", suggestion=last_words[far[0]])
    needed = [name for name, info in owner.model_fields.items() if info.is_required() and name not in given]
    if prefix and needed and len(given) == 1:
        return Refusal(path, "unknown key", suggestion=f"{prefix}.{needed[0]}")
    return Refusal(path, f"unknown key; the keys {f'of {prefix}' if prefix else 'here'} are {', '.join(siblings)}")


def _lookup(values: Any, path: Path) -> Any:
    for part in path:
        values = values[part]
    return values


def _describe(value: Any) -> str:
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…"
        return f"the text {write_value(text)!s}" if text.strip() else "empty text"
    if isinstance(value, bool) or value is None:
        return write_value(value)
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int | float):
        return f"the number {write_value(value)}"
    return f"a Python {type(value).__name__}"
