"""The keys of a job file as text, for a terminal and for a page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from tokabatch.job import Key, KeySection

_WIDTH, _PAGE_WIDTH = 110, 100
_UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_INDENTED: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    ", **_UNBROKEN}
_TOP = "Outside of any section"


def plain(sections: Sequence[KeySection], columns: int | None = None) -> str:
    """A heading for each section, and its keys below, in lines of at most `columns`."""
    width = min(columns or _WIDTH, _WIDTH)
    return "\n\n".join("\n".join((_paragraph(each, width), *(_entry(key, width) for key in each.keys))) for each in sections)


def markdown(sections: Sequence[KeySection]) -> str:
    """A heading and a list for each section, in short lines. An example is the line in the section of that name."""
    return "\n\n".join(map(_list, sections))


def _paragraph(section: KeySection, width: int) -> str:
    return fill(f"{section.name or _TOP}: {section.description}", width, **_UNBROKEN)


def _entry(key: Key, width: int) -> str:
    default = "required" if key.default is None else f"default {key.default}"
    lines = (key.description, f"Accepts {key.accepts}; {default}. For example `{_leaf(key)}: {key.example}`.")
    return "\n".join((f"\n  {key.name}", *(fill(line, width, **_INDENTED) for line in lines)))


def _list(section: KeySection) -> str:
    head = f"### `{section.name}`" if section.name else f"### {_TOP}"
    return "\n\n".join((head, fill(section.description, _PAGE_WIDTH, **_UNBROKEN), "\n".join(map(_item, section.keys))))


def _item(key: Key) -> str:
    default = "required" if key.default is None else f"default {_code(key.default)}"
    lines = (f"- `{_leaf(key)}`: {key.description}", f"  Accepts {key.accepts}; {default}.")
    wrapped = (fill(line, _PAGE_WIDTH, subsequent_indent="  ", **_UNBROKEN) for line in lines)
    return "\n".join((*wrapped, f"  Example: {_code(f'{_leaf(key)}: {key.example}')}"))


def _leaf(key: Key) -> str:
    return key.name.rpartition(".")[2]


def _code(text: str) -> str:
    return f"`{text}`"
