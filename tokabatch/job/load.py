"""Load a job file (or mapping) and its overrides as one validated model, or raise one JobError that lists everything that is
wrong.

Records where each value was written, for messages; `refusals` phrases what is wrong.
"""

from __future__ import annotations

import copy
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ValidationError

from tokabatch.errors import JobError
from tokabatch.job.control_characters import control_characters
from tokabatch.job.document import Path, parse_document
from tokabatch.job.keys import accepts_of, field_at, section_of, takes_list
from tokabatch.job.refusals import PYTHON_NONE, Refusal, dotted, refusals_of
from tokabatch.job.scalars import parse_scalar

Model = TypeVar("Model", bound=BaseModel)

_TEMPLATE_OPENINGS = ("{{", "{%", "{#")
_NO_LINE = 1 << 30
"""Sorts problems without a line after those with one."""


@dataclass
class _Draft:
    """Values before validation, with where each was written and the problems found so far."""

    name: str
    model: type[BaseModel]
    values: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)
    overrides: dict[Path, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(sort key, text): by line, then problems without a line, then overrides."""
    empty: frozenset[Path] = frozenset()
    """Keys of the file with nothing after them."""
    misread: frozenset[Path] = frozenset()
    """Keys of the file whose value the document could not read, on the key's own line."""
    dashed: dict[Path, str] = field(default_factory=dict)
    """Keys of the file whose text may be meant as a list, and what to write for one."""


@dataclass(frozen=True, slots=True)
class Written:
    """Where each key of a job was written, by its dotted name; messages begin with this place."""

    places: Mapping[str, str]

    def locate(self, message: str, key: str = "") -> str:
        """Prefix the message with the place of the first key that it names and the job gives, or of the section that it begins
        with, else of `key`."""
        named = re.findall(r"(?<![\w.])[a-z_]+(?:\.[a-z_]+)+", message)
        # An override may give a key with the whole section above it.
        above = [name.rpartition(".")[0] for name in named]
        named += [name for name in above if self.places.get(name, "").startswith(f"override `{name}=")]
        named += [message.partition(":")[0], key]
        return next((f"{self.places[name]}: {message}" for name in named if name in self.places), message)


def load_model(model: type[Model], source: object, overrides: Sequence[object]) -> tuple[Model, Written]:
    """Read, override and validate. Raises JobError naming file and line, or override, for every problem found."""
    if isinstance(source, Mapping):
        draft = _Draft("job", model, _copied(source))
    elif isinstance(source, str | pathlib.Path):
        draft = _draft_of_file(model, pathlib.Path(source))
    else:
        raise JobError(f"got a Python {type(source).__name__}; a job is the path of a job file, or a mapping of its sections")
    for number, override in enumerate(overrides):
        if not isinstance(override, str):
            raise JobError(f"got a Python {type(override).__name__} as an override; write text, for example 'generation.n=4'")
        _apply(draft, override, number)
    _refuse_empty_sections(model, draft)
    _refuse_dashes(model, draft)
    draft.problems += [_located(draft, refusal) for refusal in control_characters(draft.values)]
    # A required section that is omitted, or has nothing under it, reads as an empty mapping: messages name its keys.
    for name, info in model.model_fields.items():
        if info.is_required() and draft.values.get(name) is None and section_of(info.annotation) is not None:
            draft.values[name] = {}
    loaded: Model | None = None
    try:
        loaded = model.model_validate(draft.values)
    except ValidationError as error:
        refusals = list(refusals_of(model, error, draft.values))
        # What is misspelt, a section or a key, is not missing.
        meant = {each.suggestion for each in refusals}
        missing = [each for each in refusals if each.message.startswith("missing")]
        refusals = [each for each in refusals if each not in missing or not {each.key, str(each.path[0])} & meant]
        draft.problems += [_located(draft, refusal) for refusal in refusals if refusal.path not in draft.misread]
    else:
        draft.problems += [_located(draft, refusal) for refusal in _python_nones(model, draft.values)]
    if loaded is None or draft.problems:
        raise JobError("\n".join(text for _, text in sorted(draft.problems, key=lambda problem: problem[0])))
    places = {dotted(key): f"{draft.name}:{line}" for key, line in draft.lines.items()}
    return loaded, Written(places | {dotted(key): f"override `{text}`" for key, text in draft.overrides.items()})


def _python_nones(model: type[BaseModel], values: Mapping[str, Any], path: Path = ()) -> Iterator[Refusal]:
    """Iterate over one refusal for each text `None` of a key that means none by default: Python's word, a text in YAML."""
    for key, value in values.items():
        info = field_at(model, (*path, key))
        if isinstance(value, Mapping):
            yield from _python_nones(model, cast("Mapping[str, Any]", value), (*path, key))
        elif value == "None" and info is not None and info.default in (None, ()):
            yield Refusal((*path, key), PYTHON_NONE)


def _copied(value: Any) -> Any:
    """Copy a mapping as a job file would have it: NumPy's numbers and arrays as Python's, any mapping as a dict."""
    if isinstance(value, Mapping):
        given = cast("Mapping[Any, Any]", value)
        return {_copied(key): _copied(item) for key, item in given.items()}
    if isinstance(value, list | tuple):
        items = [_copied(item) for item in cast("Sequence[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic | np.ndarray):
        return cast("Any", value).tolist()
    try:
        return copy.deepcopy(value)
    except Exception:  # what no job can hold, such as a generator or a file, is refused by its key
        return value


def _draft_of_file(model: type[BaseModel], path: pathlib.Path) -> _Draft:
    document = parse_document(_read_text(path), str(path))
    if not isinstance(document.values, dict):
        found = "nothing" if document.values is None else "a list" if isinstance(document.values, list) else "plain text"
        raise JobError(f"{path}: holds {found}; a job file is a mapping of sections, for example `model: {{path: …}}`")
    misread = frozenset(key for key, line, _ in document.problems if document.lines.get(key) == line)
    draft = _Draft(
        str(path), model, document.values, document.lines, empty=document.empty, misread=misread, dashed=document.dashed
    )
    for key_path, line, message in document.problems:
        draft.problems.append((line, ": ".join(filter(None, (f"{path}:{line}", dotted(key_path), message)))))
    return draft


def _read_text(path: pathlib.Path) -> str:
    if path.suffix in (".py", ".ipynb") and path.is_file():
        program = f"`python {path}`" if path.suffix == ".py" else "Jupyter"
        raise JobError(f"{path}: is a program, not a job file; start it with {program}")
    if path.suffix in (".jsonl", ".parquet", ".csv", ".gz", ".zst") and path.is_file():
        raise JobError(f"{path}: is a data file, not a job file; name it as input.path in a job file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        if re.match(r"[\w.]+=", str(path)):
            raise JobError(
                f"{path}: is an override, and the job file comes before it: JOB.yaml {shlex.quote(str(path))}"
            ) from None
        folder = path.parent
        others = sorted(str(other) for pattern in ("*.yaml", "*.yml") for other in folder.glob(pattern))
        meant = get_close_matches(str(path), others, n=1, cutoff=0.8)
        near = f"; did you mean {meant[0]}?" if meant else f"; job files there: {', '.join(others[:5])}" if others else ""
        raise JobError(f"{path}: no such file (looked in {folder.absolute()}){near}") from None
    except IsADirectoryError:
        beside = pathlib.Path(f"{path}.yaml")
        remedy = f"did you mean {beside}?" if beside.is_file() else "name the job file inside it"
        raise JobError(f"{path}: is a folder; {remedy}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None


def _apply(draft: _Draft, override: str, number: int) -> None:
    if not override.isascii():
        # In some locales Python reads the bytes of arguments as surrogates. Other bytes than UTF-8 are refused.
        with suppress(UnicodeError):
            override = override.encode(errors="surrogateescape").decode()
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        is_file = pathlib.Path(override).suffix in (".yaml", ".yml")
        remedy = "a command takes one job file" if is_file else "write key=value, for example generation.n=4, without spaces"
        draft.problems.append((_rank(number), f"override `{override}`: {remedy}"))
        return
    if not text.strip() and (remedy := _for_empty(draft.model, parts)):
        draft.problems.append((_rank(number), f"override `{override}`: has no value; write {remedy}"))
        return
    try:
        value = _parse_value(text)
    except JobError:
        remedy = "close every quote and bracket, for example generation.stop='[\"\\n\\n\"]'"
        draft.problems.append((_rank(number), f"override `{override}`: the value is not valid YAML; {remedy}"))
        return
    target = draft.values
    written = parts
    for depth, part in enumerate(parts[:-1], start=1):
        if not isinstance(target.get(part), dict):
            written = min(written, parts[:depth], key=len)
            target[part] = {}
        target = target[part]
    target[parts[-1]] = value
    draft.lines = {path: line for path, line in draft.lines.items() if path[: len(written)] != written}
    draft.overrides = {path: raw for path, raw in draft.overrides.items() if path[: len(written)] != written}
    # Also for the topmost section that it created, so that a key missing there is attributed to this override.
    draft.overrides[written] = draft.overrides[parts] = override


def _for_empty(model: type[BaseModel], parts: tuple[str, ...]) -> str:
    """Return what to write in place of an override without a value, such as that of a shell's variable that is not set; nothing
    for an unknown key. No key of the schema accepts empty text, values in a mapping may be one."""
    key, info = ".".join(parts), field_at(model, parts)
    if info is not None:
        example = shlex.quote(f"{key}={accepts_of(info).example}")
        null = f" or {key}=null for {'none' if info.default is None else 'the default'}"
        return example if info.is_required() else f"{example}{null}"
    above = field_at(model, parts[:-1])
    if above is None or section_of(above.annotation) is not None:
        return ""
    empty = shlex.quote(key + '=""')
    return f"{empty} for empty text or {key}=null for null"


def _parse_value(text: str) -> Any:
    """Parse a scalar as in a file; a list, mapping or quoted text if it opens like one; a Jinja template stays text."""
    stripped = text.strip()
    if stripped.startswith(("[", "{", '"', "'")) and not stripped.startswith(_TEMPLATE_OPENINGS):
        document = parse_document(stripped, "value")
        if document.problems:
            raise JobError(document.problems[0][2])
        return document.values
    value = parse_scalar(stripped)
    return text if isinstance(value, str) else value


def _refuse_empty_sections(model: type[BaseModel], draft: _Draft) -> None:
    """Refuse `verify:` with nothing under it: it may be a section cut short, or mean null; the job must say which."""
    for path in draft.empty & draft.lines.keys():
        info = field_at(model, path)
        section = section_of(info.annotation) if info is not None else None
        if info is None or section is None or info.is_required():
            continue
        required = [name for name, each in section.model_fields.items() if each.is_required()]
        if required:
            line = draft.lines[path]
            remedy = f"give its keys ({', '.join(section.model_fields)}), or write `{path[-1]}: null` for none"
            draft.problems.append((line, f"{draft.name}:{line}: {dotted(path)}: is empty; {remedy}"))


def _refuse_dashes(model: type[BaseModel], draft: _Draft) -> None:
    """Refuse `-a` in place of `- a` where a list is accepted; a text may begin so elsewhere."""
    for path in draft.dashed.keys() & draft.lines.keys():
        info = field_at(model, path)
        if info is not None and takes_list(info):
            line = draft.lines[path]
            draft.problems.append((line, f"{draft.name}:{line}: {dotted(path)}: {draft.dashed[path]}"))
            values: Any = draft.values
            for part in path[:-1]:
                values = values[part]
            del values[path[-1]]


def _located(draft: _Draft, refusal: Refusal) -> tuple[int, str]:
    """Return the refusal's sort key, and its text with where the value was written."""
    # The override that wrote the value, or a section above it.
    above = [key for key in draft.overrides if refusal.path[: len(key)] == key]
    if above:
        override = draft.overrides[max(above, key=len)]
        return _rank(list(draft.overrides.values()).index(override)), refusal.in_override(override, draft.model)
    prefixes = (refusal.path[:end] for end in range(len(refusal.path), 0, -1))
    line = next((draft.lines[prefix] for prefix in prefixes if prefix in draft.lines), None)
    if line is None:
        return _NO_LINE, refusal.in_file(draft.name)
    return line, refusal.in_file(f"{draft.name}:{line}")


def _rank(number: int) -> int:
    return _NO_LINE + 1 + number
