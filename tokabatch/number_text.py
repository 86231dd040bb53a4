"""How numbers and spans of time are written in all that users see."""

from __future__ import annotations

from collections.abc import Mapping


def count_text(number: int) -> str:
    return f"{number:,}"


def decimal_text(number: float) -> str:
    """`6.5`, `1,200`: of a mean or median of whole numbers."""
    return f"{number:,.1f}".removesuffix(".0")


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 sample` and `1,200 samples`, of the noun for one. Give what stands behind any other number if it is not that and an s:
    `counted(number, "row has", "rows have")`."""
    return f"{number:,} {one}" if number == 1 else f"{number:,} {many or f'{one}s'}"


def others_text(reasons: Mapping[str, int], shown: int, uncounted: int = 0) -> str | None:
    """`and 4 samples for 2 other reasons`, those beyond the `shown` most frequent; None where there are none. `reasons` has
    the samples of each; `uncounted` samples have still other reasons, it is not known how many."""
    others = sorted((count for count in reasons.values() if count > 0), reverse=True)[shown:]
    samples = counted(sum(others) + uncounted, "sample")
    more = "more than " if uncounted else ""
    return f"and {samples} for {more}{counted(len(others), 'other reason')}" if others or uncounted else None


def first_counted(number: int, one: str) -> str:
    """`first row` and `first 20 rows`."""
    return f"first {one}" if number == 1 else f"first {counted(number, one)}"


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


def samples_so_far(done: int, samples: int) -> str:
    """Return `42 of 8,000 samples so far`."""
    return f"{count_text(done)} of {counted(samples, 'sample')} so far"


def figure_text(value: float) -> str:
    """`0.4123`, `39,360`: four digits, and large figures in whole numbers up to 1e9."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
