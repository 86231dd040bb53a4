"""Sections of facts, as all commands show them, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """A titled list of (label, value). With `columns`, `rows` is a table under those headings instead."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()


def count_text(number: int) -> str:
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """`1 sample`, `1,200 samples`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bytes_text(number: float) -> str:
    """`12 B`, `701 MiB`, `1.52 GiB`: three digits or more."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1000 or unit == "TiB":
            break
        number /= 1024
    return f"{number:,.0f} {unit}" if number >= 100 or unit == "B" else f"{number:,.3g} {unit}"


def share_text(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def seconds_text(seconds: float) -> str:
    """`4.1 ms`, `0.41 s`, `12.3 s`, `4:05` (minutes) or `3:04:05`."""
    if 0 < seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
