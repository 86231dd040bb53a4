"""A section of a job file as a strict model, and its keys read from its fields: what each accepts, its default, its
description.

Independent of the job's own sections.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from tokabatch.errors import JobError
from tokabatch.job.fields import Accepts
from tokabatch.job.scalars import write_value


class Section(BaseModel):
    """Frozen; refuses unknown keys and values of another type. A null leaves a key that has another default as if it were not
    given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), validate_default=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = cast("Mapping[Any, Any]", values)
        return {
            key: value for key, value in given.items() if value is not None or not _means_default(cls.model_fields.get(key))
        }

    def __setattr__(self, name: str, value: object) -> None:
        raise JobError(
            f"a job cannot be changed, and {name} is part of one; load a changed one, for example "
            "Job.load(job.given(), 'generation.n=3')"
        )

    @classmethod
    def example(cls, first: str | None = None) -> dict[str, str]:
        """Return keys that make a whole section, with values as they are written in YAML; `first` is the value of the first
        key, if one is given."""
        fields = cls.model_fields
        shown = [name for name in fields if fields[name].is_required()] or list(fields)[:1]
        values = {name: accepts_of(fields[name]).example for name in shown}
        return values if first is None else {**values, shown[0]: first}


@dataclass(frozen=True, slots=True)
class Key:
    """One key; `default` is None if the key is required. `example` is a value as it is written in YAML."""

    name: str
    accepts: str
    default: str | None
    description: str
    example: str


@dataclass(frozen=True, slots=True)
class KeySection:
    """The keys under one heading of a job file, without those of its subsections."""

    name: str
    description: str
    keys: tuple[Key, ...]


def list_sections(model: type[BaseModel], name: str = "") -> Iterator[KeySection]:
    """Iterate over the sections below a model, each before its subsections, in the order of declaration."""
    leaves = tuple(key for key in list_keys(model, f"{name}." if name else "") if key.name.rpartition(".")[0] == name)
    if leaves:
        yield KeySection(name, " ".join((model.__doc__ or "").split()), leaves)
    for field, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is not None:
            yield from list_sections(section, f"{name}.{field}" if name else field)


def list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Iterate over every leaf key below a model, dotted, in the order of declaration."""
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is not None:
            yield from list_keys(section, f"{prefix}{name}.")
            continue
        default = None if info.is_required() else write_value(info.default)
        accepts = accepts_of(info)
        yield Key(prefix + name, accepts.what, default, info.description or "", accepts.example)


def in_braces(values: Mapping[str, str]) -> str:
    """Write a section on one line; its values are written already."""
    return f"{{{', '.join(f'{name}: {value}' for name, value in values.items())}}}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field holds, optional or not; None for a leaf."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for candidate in candidates:
        # In Python 3.10 `tuple[int, ...]` is an instance of type; its origin distinguishes it.
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def takes_list(info: FieldInfo) -> bool:
    """Return whether a field accepts a list, perhaps besides other values."""
    union = get_origin(info.annotation) in (Union, types.UnionType)
    kinds = get_args(info.annotation) if union else (info.annotation,)
    return any(get_origin(kind) is tuple for kind in kinds)


def _means_default(info: FieldInfo | None) -> bool:
    """Return whether a null means the default of a field, which is another value."""
    return info is not None and not info.is_required() and info.default is not None


def field_at(model: type[BaseModel], path: Sequence[str | int]) -> FieldInfo | None:
    """Return the field at a path of keys; None if there is no such field."""
    owner: type[BaseModel] | None = model
    info: FieldInfo | None = None
    for part in path:
        info = owner.model_fields.get(str(part)) if owner is not None else None
        owner = section_of(info.annotation) if info is not None else None
    return info


def accepts_of(info: FieldInfo) -> Accepts:
    """Return the words for a field's type, with the field's own example if it has one."""
    for entry in info.metadata:
        if isinstance(entry, Accepts):
            return Accepts(entry.what, info.examples[0]) if info.examples else entry
    section = section_of(info.annotation)
    if section is not None:
        assert issubclass(section, Section)
        null = "" if info.is_required() or info.default is not None else ", or null"
        return Accepts(f"a mapping of the keys {', '.join(section.model_fields)}{null}", in_braces(section.example()))
    assert get_origin(info.annotation) is Literal, info
    choices = [write_value(choice) for choice in get_args(info.annotation)]
    other = next(each for each in choices if each != write_value(info.default))
    return Accepts(f"one of {', '.join(choices)}", info.examples[0] if info.examples else other)
