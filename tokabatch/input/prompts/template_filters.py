"""Jinja's filters for prompts. Filters that convert their value to text accept what has a text (`printing`) and return plain
text.

`default` applies to null as well as to missing values, because Parquet has only null for both. `tojson` is that of chat
templates. `random` is left out, since prompts must be reproducible, and so is `pprint`, which prints Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

from jinja2 import Environment, Undefined
from jinja2.filters import make_attrgetter

from tokabatch.input.kinds import kind_of
from tokabatch.input.prompts.printing import NotText, is_null, text_of, to_json

Filter = Callable[..., Any]

LEFT_OUT = ("random", "pprint")
TEXT = frozenset(
    "capitalize center e escape filesizeformat forceescape indent lower replace safe string striptags title trim truncate "
    "upper urlencode urlize wordcount wordwrap xmlattr".split()
)
"""Filters that convert their value to text."""
PAIRS = ("urlencode", "xmlattr")
"""Those that also accept an object, whose values are converted."""


def prompt_filters(filters: Mapping[str, Filter]) -> dict[str, Filter]:
    """Return the filters for prompts; `filters` are Jinja's own."""
    kept = {name: _plain(function) for name, function in filters.items() if name not in LEFT_OUT}
    kept |= {name: _of_text(name, filters[name]) for name in TEXT}
    return kept | {"join": _join(filters["join"]), "default": _default, "d": _default, "tojson": to_json}


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    missing = isinstance(value, Undefined) or is_null(value) or (boolean and not value)
    return default_value if missing else value


def _of_text(name: str, function: Filter) -> Filter:
    """Wrap a filter so that its value is converted to text first; its other arguments must be texts or numbers."""
    context, place = context_arguments(function), f"the value of the filter {name}"

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = list(args[context + 1 :])
        if name == "replace":
            given[:2] = [text_of(value, place=place) for value in given[:2]]
            kwargs = {key: value if key == "count" else text_of(value, place=place) for key, value in kwargs.items()}
        for value in (*given, *kwargs.values()):
            if not (value is None or isinstance(value, str | int | float | Undefined)):
                raise NotText(f"the filter {name} takes texts and numbers beside its value, not {kind_of(value)}")
        value = args[context]
        if name in PAIRS and isinstance(value, Mapping):
            pairs = cast("Mapping[Any, Any]", value).items()
            written = [(key, item) for key, item in pairs if name == "urlencode" or item is not None]
            value = {text_of(key, place=place): text_of(item, place=place) for key, item in written}
        else:
            value = text_of(value, place=place)
        return _plain_text(function(*args[:context], value, *given, **kwargs))

    return checked


def _join(function: Filter) -> Filter:
    @wraps(function)
    def join(context: Any, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
        environment = cast("Environment", context.environment)
        items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
        return text_of(d, place="the separator of join").join([text_of(item, place="an item of join") for item in items])

    return join


def _plain(function: Filter) -> Filter:
    @wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return _plain_text(function(*args, **kwargs))

    return plain


def _plain_text(value: Any) -> Any:
    """Convert Markup to plain text: its methods print whatever they are given."""
    return "".join((value, "")) if isinstance(value, str) and type(value) is not str else value


def context_arguments(function: Filter) -> int:
    """Return how many arguments Jinja passes to the filter in front of the value."""
    return int(hasattr(function, "jinja_pass_arg"))
