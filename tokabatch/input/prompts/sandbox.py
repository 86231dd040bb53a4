"""A Jinja environment with limits: templates reach nothing outside of their row and cannot run away.

On top of Jinja's immutable sandbox, each rendering has a budget: loop iterations and calls are counted, no operation may make a
text, list or number beyond a limit, the output is cut off at one, and CPU time is checked at each of these points. Values
nested in themselves count with everything that they expand to. Undefined names are errors; text is rendered exactly as written
(no auto-escaping, trailing newlines kept). Only the row's texts and numbers reach the output, never the Python representation
of an object (`printing`).

A column takes precedence over a function of Jinja's, and a field over a method: `order.items` is the row's field, and so is
`range`; `order.items()` and `range(3)` are calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokabatch.input.missing import Missing
from tokabatch.input.prompts.printing import text_of
from tokabatch.input.prompts.template_filters import context_arguments, prompt_filters

MAX_CHARACTERS = 20_000_000
MAX_ITEMS = 1_000_000
MAX_LOOP_ROUNDS = 1_000_000
MAX_CALLS = 100_000
MAX_NUMBER_BITS = 4096
MAX_DIGITS = 100
MAX_CPU_SECONDS = 10.0
ADDING = ("center", "batch", "slice", "wordwrap")
"""Filters whose result may be as long as a number among their arguments."""
MULTIPLYING = ("replace", "indent", "join", "tojson")
SLOW = ("urlize", "wordwrap", "striptags", "xmlattr", "title", "wordcount", "truncate")
"""Filters that take a microsecond or more for each character."""
MAX_SLOW_CHARACTERS = 200_000
_COUNTED, _JOINED, _BUILT, _SHOWN, _METHOD = "_counted", "_joined", "_built", "_shown", "_method"
GLOBALS = {name: f"jinja_{name}" for name in ("range", "dict", "cycler", "joiner", "namespace")}
"""Jinja's functions and their names inside. A template that calls such a name means the function; one that writes or reads it
means the row's column."""


class TemplateTooLarge(SecurityError):
    """The rendering exceeded its budget."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates so that each loop iteration, concatenation and list passes a check. Not reentrant: one rendering at a
    time."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(undefined=Missing, keep_trailing_newline=True, autoescape=False)
        self.globals = {inner: self.globals[name] for name, inner in GLOBALS.items()}
        filters = prompt_filters(self.filters)
        self.filters = {name: self._bounded(name, function) for name, function in filters.items()}
        self.filters |= {"format": _refuse_format, _COUNTED: self._counted, _JOINED: self._joined, _BUILT: self._built}
        self.filters |= {_SHOWN: self._shown, _METHOD: self._method}
        self._rounds = self._calls = 0
        self._begun = 0.0

    def render(self, generate: Callable[[Mapping[str, Any]], Iterable[str]], values: Mapping[str, Any]) -> str:
        """Return the text that a compiled template's `generate` yields. Raises TemplateTooLarge beyond the budget."""
        self._rounds = self._calls = 0
        self._begun = time.thread_time()
        pieces: list[str] = []
        length = 0
        for piece in generate(values):
            length += len(piece)
            _check(length)
            pieces.append(piece)
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _name_calls(tree)
        for output in list(tree.find_all(nodes.Output)):
            output.nodes = [node if isinstance(node, nodes.TemplateData) else _written(node) for node in output.nodes]
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filter(cast("nodes.Expr", loop.iter), _COUNTED)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [_filter(nodes.List(list(concat.nodes), lineno=concat.lineno), _JOINED)]
        _wrap_literals(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._spend()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_NUMBER_BITS:
                raise TemplateTooLarge("it computes a number with thousands of digits")
        elif operator == "*":
            _check(_size(left) * max(1, _magnitude(right)) if not isinstance(left, int) else _size(right) * _magnitude(left))
        elif operator == "+":
            _check(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _refuse_format()
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_NUMBER_BITS:
            raise TemplateTooLarge("it computes a number with thousands of digits")
        return result

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Check calls of macros, functions and methods; only methods of texts can make much out of little."""
        self._spend()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, float):
            text_of(owner, place="a number whose method is called")
        if isinstance(owner, str):
            values = (owner, *args, *kwargs.values())
            _check(_product(values) if getattr(obj, "__name__", "") in (*MULTIPLYING, "expandtabs") else _sum(values))
        result = super().call(context, obj, *args, **kwargs)
        return self._built(result) if isinstance(result, dict) else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Wrap `str.format` and `str.format_map`, which could make a text of any length."""
        return None if super().wrap_str_format(value) is None else _refuse_format

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._spend()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up `obj.attribute`: the field of an object before its method."""
        if isinstance(obj, Mapping) and attribute in obj:
            return cast("Mapping[str, Any]", obj)[attribute]
        return super().getattr(obj, attribute)

    def _spend(self) -> None:
        """Count one more call or operation."""
        self._calls += 1
        if self._calls > MAX_CALLS:
            raise TemplateTooLarge(f"it makes more than {MAX_CALLS:,} calls and operations")
        self._look_at_clock()

    def _look_at_clock(self) -> None:
        if time.thread_time() - self._begun > MAX_CPU_SECONDS:
            raise TemplateTooLarge(f"it takes more than {MAX_CPU_SECONDS:.0f} s")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._rounds += 1
            if self._rounds > MAX_LOOP_ROUNDS:
                raise TemplateTooLarge(f"its loops run more than {MAX_LOOP_ROUNDS:,} rounds")
            if self._rounds % 16 == 0:
                self._look_at_clock()
            yield value

    def _joined(self, parts: list[Any]) -> str:
        self._look_at_clock()
        _check(_sum(parts))
        return "".join([text_of(part, place="a part of a ~ b") for part in parts])

    def _built(self, value: Any) -> Any:
        """Measure a list, tuple or dict that the template has built."""
        self._look_at_clock()
        _size(value)
        return value

    def _shown(self, value: Any, name: str | None) -> str:
        """Return the text of a value that is written to the output."""
        text = text_of(value, name)
        _check(len(text))
        return text

    def _method(self, obj: Any, attribute: str) -> Any:
        """Look up `obj.attribute` in a call: the method before the field of that name."""
        return super().getattr(obj, attribute)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that its arguments are measured first."""
        context = context_arguments(function)

        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._spend()
            values = (*args[context:], *kwargs.values())
            if name == "round" and any(_magnitude(value) > MAX_DIGITS for value in (*args[1:], *kwargs.values())):
                raise TemplateTooLarge(f"it rounds to more than {MAX_DIGITS} digits")
            measure = _product if name in MULTIPLYING else _sum if name in ADDING else _sizes
            size = measure(values)
            _check(size)
            if name in SLOW and size > MAX_SLOW_CHARACTERS:
                raise TemplateTooLarge(f"the filter {name} takes at most {MAX_SLOW_CHARACTERS:,} characters")
            return function(*args, **kwargs)

        bounded.__dict__.update(getattr(function, "__dict__", {}))
        return bounded


def _name_calls(tree: nodes.Template) -> None:
    """Make calls reach Jinja's functions and methods, whatever the names of columns and fields. Names that the template defines
    itself are left alone."""
    own = {node.name for node in tree.find_all((nodes.Name, nodes.Macro)) if getattr(node, "ctx", "store") != "load"}
    for call in list(tree.find_all(nodes.Call)):
        called = call.node
        if isinstance(called, nodes.Name) and called.name in GLOBALS and called.name not in own:
            called.name = GLOBALS[called.name]
        elif isinstance(called, nodes.Getattr):
            name = nodes.Const(called.attr, lineno=called.lineno)
            call.node = nodes.Filter(called.node, _METHOD, [name], [], None, None, lineno=called.lineno)


def _written(node: nodes.Expr) -> nodes.Expr:
    name = nodes.Const(_spelled(node), lineno=node.lineno)
    return nodes.Filter(node, _SHOWN, [name], [], None, None, lineno=node.lineno)


def _spelled(node: nodes.Node) -> str | None:
    """Return how the template spells a column, field or item."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr | nodes.Getitem) and (owner := _spelled(node.node)):
        if isinstance(node, nodes.Getattr):
            return f"{owner}.{node.attr}"
        return f"{owner}[{node.arg.value!r}]" if isinstance(node.arg, nodes.Const) else None
    return None


def _wrap_literals(tree: nodes.Template) -> None:
    """Measure each list, tuple and dict that the template builds out of values."""
    for parent in list(tree.find_all(nodes.Node)):
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Expr):
                setattr(parent, name, _measured(value))
            elif isinstance(value, list):
                items = cast("list[Any]", value)
                setattr(parent, name, [_measured(item) if isinstance(item, nodes.Expr) else item for item in items])


def _measured(node: nodes.Expr) -> nodes.Expr:
    literal = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    return _filter(node, _BUILT) if literal and any(node.iter_child_nodes()) else node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _refuse_format(*_: Any, **__: Any) -> str:
    raise SecurityError("printf-style and str.format formatting are not available; use {{ value }} and | round")


def _sizes(values: Iterable[Any]) -> int:
    return sum(_size(value) for value in values)


def _sum(values: Iterable[Any]) -> int:
    return sum(_size(value) + (abs(value) if isinstance(value, int) else 0) for value in values)


def _product(values: Iterable[Any]) -> int:
    total = 1
    for value in values:
        total *= max(1, _size(value), abs(value) if isinstance(value, int) else 0)
    return total


def _size(value: Any) -> int:
    """Return the size of a value: the characters of a text; for a list or mapping, its items and everything in them, counted
    each time it occurs."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return len(value) if isinstance(value, Sized) and not isinstance(value, Undefined) else 0
    size = items = 0
    stack: list[Any] = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, list | tuple | dict):
            inner = cast("dict[Any, Any] | list[Any]", inner)
            items += len(inner)
            if items > MAX_ITEMS:
                raise TemplateTooLarge(f"it makes a list of more than {MAX_ITEMS:,} items")
            stack.extend(inner)
            if isinstance(inner, dict):
                stack.extend(inner.values())
        elif isinstance(inner, str | bytes):
            size += len(inner)
    return size + items


def _magnitude(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def _check(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateTooLarge(f"it makes more than {MAX_CHARACTERS:,} characters")
