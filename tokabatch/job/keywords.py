"""What is said of keys of a job that a Python program gives as keyword arguments: that they are overrides, and how these are
written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

from tokabatch.errors import JobError
from tokabatch.job.keys import Key
from tokabatch.job.names_elsewhere import our_name
from tokabatch.job.scalars import write_value

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def refusing_keys(
    keys: Callable[[], Iterable[Key]], remedy: str, source: int = 0
) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    """Have a function raise JobError for any of the `keys` given as an argument. `remedy` is the call to write, with {job} for
    the call of `Job.load`; the argument of number `source` is the job."""

    def decorated(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        accepted = signature(function).parameters

        @wraps(function)
        def called(*arguments: Arguments.args, **named: Arguments.kwargs) -> Returned:
            given = {word: value for word, value in named.items() if word not in accepted}
            overrides = [each for word, value in given.items() for each in _overrides(list(keys()), word, value)]
            if overrides:
                job = repr(arguments[source]) if len(arguments) > source and isinstance(arguments[source], str) else "..."
                write = remedy.format(job=f"Job.load({', '.join([job, *map(repr, overrides)])})")
                name = remedy.format(job="Job.load").partition("(")[0]
                raise JobError(f"{name} takes no keys of a job, such as {next(iter(given))}: write {write}")
            if given:
                quiet = "; progress=False shows nothing" if "progress" in accepted else ""
                there = ", ".join(list(accepted)[source:])
                raise TypeError(f"there is no argument {next(iter(given))}; there are {there}{quiet}")
            return function(*arguments, **named)

        return called

    return decorated


def _overrides(keys: list[Key], word: str, value: object) -> list[str]:
    """Return the overrides that mean the argument; none if `word` is no key, or the last word of keys of several sections."""
    name = our_name((word,))
    if any(key.name.startswith(f"{name}.") for key in keys):
        values = cast("Mapping[Any, Any]", value if isinstance(value, Mapping) else {})
        return [f"{name}.{key}={write_value(each)}" for key, each in values.items()] or [f"{name}={write_value(value)}"]
    found = [key.name for key in keys if name in (key.name, key.name.rpartition(".")[2])]
    sections = {key.partition(".")[0] for key in found}
    return [f"{found[0]}={write_value(value)}"] if len(sections) == 1 else []
