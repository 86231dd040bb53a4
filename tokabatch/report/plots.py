"""The figures of a report page as SVG, drawn by matplotlib, which only this module imports.

Such an SVG needs no script and takes about 20 kB; a plotting library for browsers would add megabytes to every page. Text in
the figures remains text, in the font of the page. Each figure is drawn twice, as `svg.wide` and `svg.narrow`, of which the page
shows the one for the width that it has: text keeps its size and its place on a phone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokabatch.arrays import Float64, Int64
from tokabatch.number_text import decimal_text

INK, SECOND = "#1f6feb", "#d1741f"
_WIDTHS, _HEIGHT = {"wide": 5.6, "narrow": 3.7}, 2.6
"""In inches of 72 units."""
_NARROW_AXIS, _DIGIT = 190.0, 5.6
"""Units from the first tick to the last in a narrow drawing, and of a digit's width."""
_BARS = 20
"""The most bars of a histogram of shares."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.labelpad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b949e",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve over time; `filled` down to zero."""

    label: str
    values: Float64
    color: str = INK
    filled: bool = False


def over_time(seconds: Float64, curves: Sequence[Curve], unit: str, top: float | None = None) -> str:
    """Draw curves over seconds since the first step: each value is the mean over the time up to its place in `seconds`, from
    the one before or the start. `top` is the upper end of the axis of shares."""
    figure, axes = _open()
    scale, name = (1.0, "seconds") if seconds[-1] < 300 else (60.0, "minutes") if seconds[-1] < 18_000 else (3600.0, "hours")
    times = np.append(0.0, seconds) / scale
    for curve in curves:
        values = np.append(curve.values[0], curve.values)
        if curve.filled:
            axes.fill_between(times, values, step="pre", color=curve.color, alpha=0.25, linewidth=0)
        axes.plot(times, values, drawstyle="steps-pre", color=curve.color, linewidth=1.4, label=curve.label)
    axes.set_ylim(0, top)
    if top is None:
        _count(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.set_xlim(0, max(float(seconds[-1]) / scale, 1e-9))
    axes.set_xlabel(name)
    axes.set_ylabel(unit)
    if len(curves) > 1:
        _legend(axes)
    return _close(figure)


def histogram(values: npt.NDArray[np.int32] | Float64, unit: str, counted: str) -> str:
    """Draw a histogram of `values` in at most 60 bins, which hold equally many whole numbers if the values are such; `counted`
    names what has these values."""
    figure, axes = _open()
    whole = np.issubdtype(values.dtype, np.integer)
    bins: int | list[float] = min(60, max(1, len(np.unique(values))))
    if whole:
        low, high = int(values.min()), int(values.max())
        width = -(-(high - low + 1) // 60)
        bins = [edge - 0.5 for edge in range(low, high + width + 1, width)]
    axes.hist(values, bins=bins, color=INK, alpha=0.8)
    mean = float(values.mean())
    axes.axvline(mean, color=SECOND, linewidth=1.2, label=f"mean {decimal_text(mean) if whole else f'{mean:,.2f}'}")
    axes.set_xlabel(unit)
    axes.set_ylabel(counted)
    for axis in (axes.xaxis, axes.yaxis) if whole else (axes.yaxis,):
        _count(axis)
    _legend(axes)
    return _close(figure)


def histogram_of_shares(parts: Int64, wholes: Int64, unit: str, counted: str, *, mean: bool = True) -> str:
    """Draw how many pairs of a part and its whole there are of each share, and with `mean` the mean share: a bar for each part
    where all wholes are the same small number, else for each twentieth, of which the last includes the whole."""
    figure, axes = _open()
    whole = int(wholes.max())
    if wholes.min() == whole <= _BARS:
        heights = np.bincount(parts, minlength=whole + 1)
        centers, width = np.arange(whole + 1) / whole, min(1 / whole, 0.1)
    else:
        heights = np.bincount(np.minimum(parts * _BARS // wholes, _BARS - 1), minlength=_BARS)
        centers, width = (np.arange(_BARS) + 0.5) / _BARS, 1 / _BARS
    # Room for half a bar on both sides.
    axes.set_xlim(-0.06, 1.06)
    axes.set_xticks(centers if len(centers) < 6 else np.linspace(0, 1, 6))
    axes.bar(centers, heights, width=0.92 * width, color=INK, alpha=0.8)
    if mean:
        share = float((parts / wholes).mean())
        axes.axvline(share, color=SECOND, linewidth=1.2, label=f"mean {share:.1%}")
        _legend(axes)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.set_xlabel(unit)
    axes.set_ylabel(counted)
    _count(axes.yaxis)
    return _close(figure)


@dataclass(frozen=True, slots=True)
class Band:
    """A curve over whole numbers with its confidence band."""

    label: str
    x: Sequence[int]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def with_bands(bands: Sequence[Band], unit: str) -> str:
    """Draw at most two curves with their confidence bands over a logarithmic axis."""
    figure, axes = _open()
    for band, color in zip(bands, (INK, SECOND), strict=False):
        if len(band.x) > 1:
            axes.fill_between(band.x, band.low, band.high, color=color, alpha=0.2, linewidth=0)
        else:
            # A band of one point has no area.
            axes.vlines(band.x, band.low, band.high, color=color, alpha=0.5, linewidth=3)
        axes.plot(band.x, band.value, color=color, marker="o", markersize=3, linewidth=1.4, label=band.label, clip_on=False)
    axes.set_xscale("log", base=2)
    ticks = sorted({k for band in bands for k in band.x})
    axes.set_xticks(ticks, _apart(ticks))
    top = 1.05 * max(high for band in bands for high in band.high)
    axes.set_ylim(0, top if 0 < top < 0.75 else 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.set_xlabel(unit)
    _legend(axes)
    return _close(figure)


def _apart(ticks: Sequence[int]) -> list[str]:
    """Return the labels of ticks on a logarithmic axis, empty for one that would touch the next in the narrow drawing."""
    labels: list[str] = []
    span, after = max(math.log2(ticks[-1] / ticks[0]), 1e-9), math.inf
    for tick in reversed(ticks):
        place = math.log2(tick / ticks[0]) / span * _NARROW_AXIS
        reach = (len(str(tick)) / 2 + 0.5) * _DIGIT
        labels.append(str(tick) if place + reach < after else "")
        after = place - reach if labels[-1] else after
    return labels[::-1]


def _count(axis: Axis) -> None:
    """Put round whole numbers on an axis."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda number, _: f"{number:,.10g}")


def _legend(axes: Axes) -> None:
    """Name the curves in a line above the axes, where they cover nothing."""
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2)


def _open() -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        return figure, figure.add_subplot()


def _close(figure: Figure) -> str:
    drawn: list[str] = []
    for name, width in _WIDTHS.items():
        figure.set_size_inches(width, _HEIGHT)
        sink = io.StringIO()
        # The ids of the two differ: one of a figure that is not displayed cannot be referred to.
        with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = sink.getvalue()
        drawn.append(text[text.index("<svg") :].replace("<svg", f"<svg class={name}", 1))
    return "".join(drawn)
