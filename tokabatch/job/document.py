"""A YAML text as plain values, with the line of each key.

Safe by construction: no tags, no anchors or aliases (so no alias bombs), bounded size and nesting, one document, and a mapping
at the top. Independent of the job's keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from tokabatch.errors import JobError
from tokabatch.job.scalars import parse_scalar
from tokabatch.job.yaml_faults import explain, hide_breaks, missing_space, quoted, show_breaks
from tokabatch.number_text import counted

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 20

Path = tuple[str | int, ...]

_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


@dataclass
class _Notes:
    """Findings collected while values are built."""

    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[Path, int, str]] = field(default_factory=list)
    empty: set[Path] = field(default_factory=set)
    dashed: dict[Path, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Resolves nothing by itself: every plain scalar arrives as the characters that were written."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML reads the class attribute)


@dataclass(frozen=True)
class Document:
    """`values` nested as written; `lines` maps the path of every key and list item to its line, counted from 1."""

    values: Any
    lines: dict[Path, int] = field(default_factory=dict)
    problems: tuple[tuple[Path, int, str], ...] = ()
    """Faults that leave the rest readable (duplicate keys), as (path of the key, line, what is wrong)."""
    empty: frozenset[Path] = frozenset()
    """The keys with nothing after their colon; their value is None, like that of an explicit null."""
    dashed: dict[Path, str] = field(default_factory=dict)
    """Of the keys whose text begins like items of a list without a space behind the dash: what to write instead."""


def parse_document(text: str, name: str) -> Document:
    """Parse one YAML document. Raises JobError naming `name` and the line if it cannot be read at all."""
    if len(text) > MAX_CHARACTERS:
        raise JobError(f"{name}: {counted(len(text), 'character')} is no job file; the limit is {MAX_CHARACTERS:,}")
    text = hide_breaks(text)
    try:
        _refuse_unsafe(text, name)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, message = explain(error, text)
        raise JobError(f"{name}:{line}: {message}" if line else f"{name}: {message}") from None
    if node is None:
        return Document(values=None)
    notes = _Notes()
    values = _construct(node, (), notes)
    return Document(values, notes.lines, tuple(notes.problems), frozenset(notes.empty), notes.dashed)


def _refuse_unsafe(text: str, name: str) -> None:
    depth = 0
    for token in yaml.scan(text, Loader=_Loader):
        line = token.start_mark.line + 1
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            sign = "&" if isinstance(token, yaml.AnchorToken) else "*"
            raise JobError(
                f"{name}:{line}: `{sign}{token.value}`: YAML anchors and aliases are not accepted; "
                "write the value out, or put text that begins with & or * in quotes"
            )
        if isinstance(token, yaml.TagToken):
            tag = text[token.start_mark.index : token.end_mark.index]
            raise JobError(
                f"{name}:{line}: `{tag}`: YAML tags are not accepted; write a plain value, "
                "or put text that begins with ! in quotes"
            )
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise JobError(f"{name}:{line}: nested more than {MAX_DEPTH} levels deep")


def _without_dash(key: yaml.ScalarNode, value: yaml.Node) -> str | None:
    """What to say of a text that was meant as the first item of a list: below its key, or with a quote behind the dash."""
    if not isinstance(value, yaml.ScalarNode) or value.style is not None:
        return None
    if value.start_mark.line == key.end_mark.line:
        quoted = re.fullmatch(r"-(\"[^\"]*\"|'[^']*')", value.value)
        return f"a list on the line of its key is written in brackets: [{quoted[1]}]" if quoted else None
    return missing_space(value.value.partition(" -")[0])


def _no_key(node: yaml.MappingNode, path: Path) -> str:
    """What to say of a mapping with a key that is no text, as a template without quotes is."""
    begin, end = node.start_mark, node.end_mark
    source = begin.buffer[begin.index : end.index] if begin.buffer is not None else ""
    if not source.startswith("{{"):
        return "a key must be a single word, not a list or mapping"
    key = f"{path[-1]}: " if path and isinstance(path[-1], str) else ""
    return f"a template needs quotes, because {{ begins a mapping: `{key}{quoted(source)}`"


def _construct(node: yaml.Node, path: Path, notes: _Notes) -> Any:
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                notes.problems.append((path, line, _no_key(node, path)))
                continue
            key = show_breaks(key_node.value)
            key_path = (*path, key)
            if key in values:
                notes.problems.append((key_path, line, f"given twice, first on line {notes.lines[key_path]}; keep one"))
                continue
            notes.lines[key_path] = line
            if advice := _without_dash(key_node, value_node):
                notes.dashed[key_path] = advice
            values[key] = _construct(value_node, key_path, notes)
        return values
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for index, child in enumerate(node.value):
            notes.lines[(*path, index)] = child.start_mark.line + 1
            items.append(_construct(child, (*path, index), notes))
        return items
    assert isinstance(node, yaml.ScalarNode)
    if node.style in ("|", ">") and not node.value:
        line = node.start_mark.line + 1
        notes.problems.append((path, line, f"has no text; indent every line of it further than the line with the {node.style}"))
        return None
    if node.style is not None:
        return show_breaks(node.value)
    if not node.value:
        notes.empty.add(path)
    return parse_scalar(show_breaks(node.value))
