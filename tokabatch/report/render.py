"""Draws sections of facts: rich tables on a terminal, HTML in a notebook, aligned plain text elsewhere. Knows no figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tokabatch.report.sections import Section


def plain(sections: Sequence[Section]) -> str:
    """The sections as text without any control codes; columns aligned, long values left as they are."""
    return "\n\n".join("\n".join(_plain_lines(section)) for section in sections)


def tables(sections: Sequence[Section]) -> RenderableType:
    """The sections as rich tables. Values are shown literally: markup inside them is text."""
    parts: list[RenderableType] = []
    for section in sections:
        parts += [Text(section.title, style="bold"), Padding(_table(section), (0, 0, 1, 0))]
    return Group(*parts)


def html(sections: Sequence[Section]) -> str:
    """The sections as HTML tables, each under its title; a value's lines stay lines."""
    return "".join(
        f"<b>{escape(section.title)}</b><table>"
        + "".join(
            f"<tr>{''.join(f'<td>{_html_lines(cell)}</td>' for cell in row)}</tr>"
            for row in (*filter(None, (section.columns,)), *section.rows)
        )
        + "</table>"
        for section in sections
    )


def _html_lines(cell: str) -> str:
    return escape(cell).replace("\n", "<br>")


def _plain_lines(section: Section) -> Iterator[str]:
    yield section.title
    rows = [section.columns, *section.rows] if section.columns else list(section.rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        labels = "".join(f"{cell:<{width + 2}}" for cell, width in zip(row, widths, strict=False) if width)
        first, *rest = row[-1].split("\n")
        yield f"  {labels}{first}".rstrip()
        # A value of several lines (a prompt) keeps its own indentation behind the label.
        yield from (f"  {' ' * len(labels)}{line}".rstrip() for line in rest)


def _table(section: Section) -> Table:
    table = Table(box=None, show_header=bool(section.columns), header_style="dim", pad_edge=False, padding=(0, 2))
    for column in range(len(section.rows[0]) if section.rows else 0):
        heading = section.columns[column] if section.columns else ""
        last = column == len(section.rows[0]) - 1
        table.add_column(heading, style="" if last else "cyan", no_wrap=not last, overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
