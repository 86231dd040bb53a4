"""The keys of a job file as text, for a terminal and for a page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from tokabatch.job import Key, KeySection

_WIDTH = 110
_TOP = "Outside of any section"


def plain(sections: Sequence[KeySection]) -> str:
    """A heading for each section, and its keys below."""
    return "\n\n".join("\n".join((_paragraph(each), *map(_entry, each.keys))) for each in sections)


def markdown(sections: Sequence[KeySection]) -> str:
    """A heading and a table for each section. An example is the line in the section of that name."""
    return "\n\n".join(_table(each) for each in sections)


def _paragraph(section: KeySection) -> str:
    return fill(f"{section.name or _TOP}: {section.description}", _WIDTH)


def _entry(key: Key) -> str:
    default = "required" if key.default is None else f"default {key.default}"
    lines = (key.description, f"Accepts {key.accepts}; {default}. For example `{_leaf(key)}: {key.example}`.")
    return "\n".join(
        (f"\n  {key.name}", *(fill(line, _WIDTH, initial_indent="    ", subsequent_indent="    ") for line in lines))
    )


def _table(section: KeySection) -> str:
    head = (
        f"### `{section.name}`" if section.name else f"### {_TOP}",
        "",
        section.description,
        "",
        "| key | | accepts | default | example |",
        "|---|---|---|---|---|",
    )
    rows = (
        f"| `{_leaf(key)}` | {_cell(key.description)} | {_cell(key.accepts)} | "
        f"{'required' if key.default is None else _code(key.default)} | {_code(f'{_leaf(key)}: {key.example}')} |"
        for key in section.keys
    )
    return "\n".join((*head, *rows))


def _leaf(key: Key) -> str:
    return key.name.rpartition(".")[2]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text)}`"
