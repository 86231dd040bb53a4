"""Arrow types for JSON values, inferred while the values stream by.

Whole numbers and fractions in one column become float64 if that loses nothing. Values of different kinds, numbers beyond 64
bits, empty objects and objects with too many different keys become a string column of JSON text. A schema's metadata names the
places of such strings, and `parse_json_texts` makes values of them again. Memory is bounded for a bounded number of columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

MAX_FIELDS = 256
MAX_DEPTH = 16
JSON_TEXTS_KEY = b"tokabatch.json_texts"
"""Key of a schema's metadata: the places whose strings hold JSON text, as a JSON list of lists. Earlier versions wrote the
places as texts, by `place_name`, of which two may be equal."""
EXACT_FLOAT = 1 << 53
_REWRITTEN = 6
"""How much longer JSON text may become when it is rewritten: 1e15 becomes 1000000000000000.0."""
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (type(None), bool, int, float, str, list, dict)}

Encoder = Callable[[Any], Any]
Place = tuple[str | None, ...]
"""A column's name in the input and the way on from there: a field's name, or None for the items of a list."""


class JsonType:
    """The values of one column, list or field seen so far."""

    __slots__ = ("_as_text", "_depth", "_fields", "_inexact", "_items", "_kinds")

    def __init__(self, depth: int = 0) -> None:
        self._kinds: set[type] = set()
        self._items: JsonType | None = None
        self._fields: dict[str, JsonType] = {}
        self._inexact = False
        self._as_text = depth >= MAX_DEPTH
        self._depth = depth

    @classmethod
    def restored(cls, state: Mapping[str, Any], depth: int = 0) -> JsonType:
        """Restore an object from its `state`."""
        kind = cls(depth)
        kind._kinds = {_KINDS[name] for name in state["kinds"]}
        kind._inexact, kind._as_text = bool(state["inexact"]), bool(state["as_text"])
        kind._items = None if state["items"] is None else cls.restored(state["items"], depth + 1)
        kind._fields = {name: cls.restored(field, depth + 1) for name, field in state["fields"].items()}
        return kind

    def state(self) -> dict[str, Any]:
        """Return everything inferred, as plain JSON values."""
        return {
            "kinds": sorted(kind.__name__ for kind in self._kinds),
            "inexact": self._inexact,
            "as_text": self._as_text,
            "items": self._items and self._items.state(),
            "fields": {name: field.state() for name, field in self._fields.items()},
        }

    def add(self, value: Any) -> None:
        kind = type(value)
        self._kinds.add(kind)
        if kind is int:
            if not -EXACT_FLOAT <= value <= EXACT_FLOAT:
                self._inexact = True
                self._as_text = self._as_text or not INT64_MIN <= value <= INT64_MAX
        elif kind is list and not self._as_text:
            self._items = self._items or JsonType(self._depth + 1)
            for item in value:
                self._items.add(item)
        elif kind is dict and not self._as_text:
            for name, item in value.items():
                field = self._fields.get(name)
                if field is None:
                    if len(self._fields) >= MAX_FIELDS:
                        self._as_text, self._fields = True, {}
                        break
                    field = self._fields[name] = JsonType(self._depth + 1)
                field.add(item)

    def arrow(self) -> pa.DataType:
        """Return the type that fits every value seen, once encoded."""
        kinds = self._kinds - {type(None)}
        if self.is_text():
            return pa.string()
        if kinds <= {int}:
            return pa.int64()
        if kinds <= {int, float}:
            return pa.float64()
        if kinds == {bool}:
            return pa.bool_()
        if kinds == {list}:
            return pa.list_(self._items.arrow() if self._items else pa.string())
        return pa.struct([pa.field(name, field.arrow()) for name, field in self._fields.items()])

    def encoder(self) -> Encoder | None:
        """Return a function that converts a value to the Arrow type; None if nothing needs converting."""
        if self.is_text():
            return _json_text if self._holds_json() else None
        if list in self._kinds:
            inner = self._items.encoder() if self._items else None
            return (lambda value: None if value is None else [inner(item) for item in value]) if inner else None
        fields = {name: encode for name, field in self._fields.items() if (encode := field.encoder())}

        def encode_object(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
            if value is None:
                return None
            return {name: fields[name](item) if name in fields else item for name, item in value.items()}

        return encode_object if fields else None

    def fixed_bytes(self) -> int:
        """Return the bytes that an Arrow value takes however short its JSON text is."""
        if self.is_text() or list in self._kinds:
            return 8
        return 8 if not self._fields else sum(field.fixed_bytes() for field in self._fields.values())

    def growth(self) -> int:
        """Return the bytes that an Arrow value may take for each byte of its JSON text, besides the fixed ones."""
        if self.is_text():
            return _REWRITTEN if self._holds_json() else 1
        if list in self._kinds:
            # An item and its separator are at least two bytes of text.
            return self._items.growth() + -(-self._items.fixed_bytes() // 2) if self._items else 1
        return max((field.growth() for field in self._fields.values()), default=0)

    def json_texts(self, place: Place) -> Iterator[Place]:
        """Iterate over the places from `place` on where strings of the Arrow type hold JSON text."""
        if self.is_text():
            if self._holds_json():
                yield place
            return
        if self._items is not None:
            yield from self._items.json_texts((*place, None))
        for name, field in self._fields.items():
            yield from field.json_texts((*place, name))

    def is_text(self) -> bool:
        """Return whether the column is of strings: all values are, or no other single type fits them."""
        kinds = self._kinds - {type(None)}
        if not kinds or self._as_text or kinds == {str} or (kinds == {dict} and not self._fields):
            return True
        return not (len(kinds) == 1 or (kinds == {int, float} and not self._inexact))

    def _holds_json(self) -> bool:
        """Return whether a string column holds JSON text rather than the values themselves."""
        return not self._kinds <= {str, type(None)}


def _json_text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def place_name(place: Place) -> str:
    """Return a place as messages name it: `answer`, `meta.size`, `tags[]`."""
    column, *way = place
    return f"{column}{''.join('[]' if part is None else f'.{part}' for part in way)}"


def json_texts(schema: pa.Schema, names: Mapping[str, str] | None = None) -> list[Place]:
    """Return the places of strings that hold JSON text, by the schema's metadata. `names` are the input's columns, each with
    its name in the input, where it has another one there; by default all."""
    stored = json.loads((schema.metadata or {}).get(JSON_TEXTS_KEY, b"[]"))
    texts = {each for each in stored if isinstance(each, str)}
    if not texts:
        return [tuple(each) for each in stored]
    sources = dict(zip(schema.names, schema.names, strict=True)) if names is None else names
    strings = (place for name, source in sources.items() for place in _strings(schema.field(name).type, (source,)))
    return [place for place in strings if place_name(place) in texts]


def _strings(kind: pa.DataType, place: Place) -> Iterator[Place]:
    """Iterate over the places from `place` on that hold strings."""
    if pa.types.is_string(kind):
        yield place
    elif pa.types.is_list(kind):
        yield from _strings(kind.value_type, (*place, None))
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _strings(field.type, (*place, field.name))


def parse_json_texts(rows: Sequence[dict[str, Any]], schema: pa.Schema, names: Mapping[str, str] | None = None) -> None:
    """Replace in `rows`, read with this schema, every JSON text by the value that the input's row held. Columns that are not in
    `names`, which are as for `json_texts`, stay."""
    places = frozenset(json_texts(schema, names))
    if not places:
        return
    sources = dict(zip(schema.names, schema.names, strict=True)) if names is None else names
    parsers = {
        name: parse for name, source in sources.items() if (parse := _parser(schema.field(name).type, (source,), places))
    }
    for row in rows:
        row.update({name: parse(row[name]) for name, parse in parsers.items() if name in row})


def _value(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        # An earlier version's metadata may name this place along with another one that is called the same.
        return text


def _parser(kind: pa.DataType, place: Place, places: Collection[Place]) -> Encoder | None:
    """Return the inverse of `JsonType.encoder` for the values at `place`; None if there is no JSON text among them."""
    if place in places:
        return _value
    if pa.types.is_list(kind):
        item = _parser(kind.value_type, (*place, None), places)
        return None if item is None else lambda value: None if value is None else [item(each) for each in value]
    if not pa.types.is_struct(kind):
        return None
    fields = {field.name: parse for field in kind if (parse := _parser(field.type, (*place, field.name), places))}

    def parse_object(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else {name: fields[name](item) if name in fields else item for name, item in value.items()}

    return parse_object if fields else None
