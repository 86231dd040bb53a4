"""A Jinja environment in which a template can neither reach out nor run away.

On top of Jinja's immutable sandbox every rendering has a budget: loop rounds are counted, no operation may make a text or
list beyond MAX_CHARACTERS, and the output is cut off there. Undefined names are errors; text is rendered exactly as written
(no auto-escaping, a trailing newline stays).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 20_000_000
MAX_LOOP_ROUNDS = 1_000_000
MAX_NUMBER_BITS = 4096
ADDING = ("center", "batch", "slice", "tojson", "wordwrap")
MULTIPLYING = ("replace", "indent", "join")
FORMATTING = ("format", "format_map")
_BUDGET = "_loop_budget"
_COUNTED = "_counted"
_JOINED = "_joined"


class TemplateTooLarge(SecurityError):
    """The rendering went past its budget."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Parses templates so that each loop round and each concatenation passes a check."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        filters = cast("dict[str, Callable[..., Any]]", self.filters)
        filters.update({name: _checked(filters[name], _sum) for name in ADDING})
        filters.update({name: _checked(filters[name], _product) for name in MULTIPLYING})
        filters.update({"format": _refuse_format, _COUNTED: _counted, _JOINED: _joined})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filter(cast("nodes.Expr", loop.iter), _COUNTED)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [_filter(nodes.List(list(concat.nodes), lineno=concat.lineno), _JOINED)]
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_NUMBER_BITS:
                raise TemplateTooLarge("it computes a number with thousands of digits")
        elif operator == "*":
            _check(_size(left) * max(1, _magnitude(right)) if not isinstance(left, int) else _size(right) * _magnitude(left))
        elif operator == "+":
            _check(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _refuse_format()
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Method calls on text: the only ones that could make much out of little."""
        if isinstance(owner := getattr(obj, "__self__", None), str):
            if getattr(obj, "__name__", "") in FORMATTING:
                _refuse_format()
            values = (owner, *args, *kwargs.values())
            _check(_product(values) if getattr(obj, "__name__", "") in (*MULTIPLYING, "expandtabs") else _sum(values))
        return super().call(context, obj, *args, **kwargs)


def render(generate: Callable[[Mapping[str, Any]], Iterable[str]], values: Mapping[str, Any]) -> str:
    """The text that a compiled template's `generate` yields. Raises TemplateTooLarge past the budget."""
    pieces: list[str] = []
    length = 0
    for piece in generate({**values, _BUDGET: [MAX_LOOP_ROUNDS]}):
        length += len(piece)
        _check(length)
        pieces.append(piece)
    return "".join(pieces)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    budget = cast("list[int]", context.resolve(_BUDGET))
    for value in values:
        budget[0] -= 1
        if budget[0] < 0:
            raise TemplateTooLarge(f"its loops run more than {MAX_LOOP_ROUNDS:,} rounds")
        yield value


def _joined(parts: list[Any]) -> str:
    _check(_sum(parts))
    return "".join(map(str, parts))


def _checked(function: Callable[..., Any], measure: Callable[[Iterable[Any]], int]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check(measure((*args, *kwargs.values())))
        return function(*args, **kwargs)

    checked.__dict__.update(function.__dict__)
    return checked


def _refuse_format(*_: Any) -> str:
    raise SecurityError("printf-style and str.format formatting are not available; use {{ value }} and | round")


def _sum(values: Iterable[Any]) -> int:
    return sum(_size(value) if isinstance(value, Sized) else _magnitude(value) for value in values)


def _product(values: Iterable[Any]) -> int:
    total = 1
    for value in values:
        total *= max(1, _size(value) if isinstance(value, Sized) else _magnitude(value))
    return total


def _size(value: Any) -> int:
    """Characters of a text; of a list also those of the texts in it."""
    if isinstance(value, list | tuple):
        items = cast("list[Any]", value)
        return len(items) + sum(len(item) for item in items if isinstance(item, str))
    return len(value) if isinstance(value, Sized) else 0


def _magnitude(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def _check(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateTooLarge(f"it makes more than {MAX_CHARACTERS:,} characters")
