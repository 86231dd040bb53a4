"""A run as a self-contained HTML page: figures first, then charts and samples. Reads no files and needs no engine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from tokabatch.errors import EXIT_ERRORS
from tokabatch.number_text import counted, decimal_text, figure_text, seconds_text
from tokabatch.output.steps import elapsed
from tokabatch.report import plots
from tokabatch.report.closing import errors_section
from tokabatch.report.page_rows import hardest_rows, row_figures
from tokabatch.report.page_samples import folded_value, samples_shown
from tokabatch.report.page_style import CSS
from tokabatch.report.run_record import RunRecord
from tokabatch.report.step_figures import step_figures
from tokabatch.scoring.estimates import Estimate, distinct

PAGE_START = "<!doctype html><html lang=en><meta charset=utf-8>"
"""How each page begins, of earlier versions, too."""
_SHORT = ("Prompt tokens", "Predicted and actual")
"""Figures that half of the height is enough for."""
_HALF, _THIRD = "26rem", "21rem"
"""The least width of figures in rows of two and of three."""
_MEANINGS = {
    "pass@": "the chance that at least one of k samples of a problem (one row of the input) is right",
    "maj@": "the chance that the most frequent answer of k samples is right",
    "best-of-": "the score of the likeliest of k samples",
}
_COLORS = (plots.INK, "#9ec5fe", plots.SECOND)


def render_page(run: RunRecord) -> str:
    """Return the page as HTML."""
    tiles = [
        f"<div class=tile><b{' class=bad' if alert else ''}>{_text(v)}</b><span>{_text(k)}</span></div>"
        for k, v, alert in _tiles(run)
    ]
    cells, least = _cells(_figures(run))
    return (
        f"{PAGE_START}<meta name=viewport content='width=device-width'>"
        f"<title>tokabatch report: {escape(run.name)}</title><style>{CSS}</style>"
        f"<h1><small>tokabatch report</small>{escape(run.name)}</h1>"
        f"<p class=sub>model {escape(run.model)}, {escape(_state(run))}{escape(_started(run))}</p>"
        f"<div class=tiles style='--columns:{_columns(len(tiles))}'>{''.join(tiles)}</div>{_meanings(run)}{_errors(run)}"
        f"<div class=plots style='--least:{least}'>{''.join(cells)}</div>"
        f"{hardest_rows(run)}{samples_shown(run)}{_facts(run)}</html>\n"
    )


def _cells(figures: Sequence[tuple[str, str, str]]) -> tuple[list[str], str]:
    """Return the figures as HTML, and their least width. Two short ones are stacked where that fills rows of three."""
    drawn = [
        f"<figure><figcaption>{escape(title)}<small>{_text(note)}</small></figcaption>{drawing}</figure>"
        for title, note, drawing in figures
    ]
    short = [place for place, (title, _, _) in enumerate(figures) if title in _SHORT]
    if len(short) < 2 or (len(drawn) - 1) % 3:
        # In rows of three, four would leave one alone, and the last of four charts would stretch two short figures beside it.
        return drawn, _HALF if len(drawn) == 4 or (len(drawn) == 6 and len(short) == 2) else _THIRD
    stack = f"<div class=stack>{''.join(drawn[place] for place in short)}</div>"
    return [*(figure for place, figure in enumerate(drawn) if place not in short), stack], _THIRD


def _text(text: str) -> str:
    """Return text as HTML that does not break between a number and its unit."""
    return escape(re.sub(r"(?<=\d) (?=(?:ms|s)\b|%)", "\u00a0", text))


def _started(run: RunRecord) -> str:
    return "".join(f", started {value}" for name, value in run.facts if name == "started")


def _columns(tiles: int) -> int:
    """Return how many tiles stand side by side on a wide screen, so that the last line has the fewest gaps."""
    return min((5, 4), key=lambda columns: -tiles % columns)


def _state(run: RunRecord) -> str:
    """Return the state, and what is wrong with a complete run: no verdicts, or too many errors."""
    if run.state != "complete":
        return run.state
    if 0 < run.ok <= run.without_verdict:
        return "complete, but no sample has a verdict"
    if run.summary.get("exit_code") == EXIT_ERRORS:
        found = f"{counted(run.errors, 'error')} in {counted(run.samples, 'sample')}"
        return f"complete, but with {found}, more than errors.max_fraction allows"
    return run.state


def _meanings(run: RunRecord) -> str:
    """Say below the tiles what the estimates among them mean."""
    shown = distinct(run.estimates or ())
    said = [f"{kind}k: {text}." for kind, text in _MEANINGS.items() if any(each.name.startswith(kind) for each in shown)]
    if any(each.interval(".1%") for each in shown):
        said.append(f"In brackets: 95% intervals over the rows{_alike(shown)}.")
    return f"<p class=sub>{' '.join(said)}</p>" if said else ""


def _alike(estimates: Sequence[Estimate]) -> str:
    """Say what the interval is where all rows give 0 or 1."""
    if not any(
        each.value in (0.0, 1.0) and each.low >= 0 and each.high <= 1 and each.high - each.low < 1 for each in estimates
    ):
        return ""
    return "; where all rows are at 0% or 100%, they allow for rows unlike these (Clopper and Pearson, 1934)"


def _errors(run: RunRecord) -> str:
    if run.error_rows is None or not run.error_rows.rows:
        return ""
    section = errors_section(run.error_rows)
    head = "".join(f"<th>{escape(name)}" for name in section.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in section.rows)
    return f"<h2>Error rows</h2><table class=errors><tr>{head}{rows}</table>"


def _error_rows(run: RunRecord) -> str:
    rows = sum(run.error_rows.counts.values()) if run.error_rows is not None else run.errors
    return f" ({counted(rows, 'row')})" if rows != run.errors else ""


def _facts(run: RunRecord) -> str:
    rows = "".join(f"<tr><th>{escape(name)}<td>{folded_value(value)}" for name, value in run.facts)
    return f"<h2>The run</h2><table class='keyed facts'>{rows}</table>" if rows else ""


def _tiles(run: RunRecord) -> list[tuple[str, str, bool]]:
    """Return label, value, and whether it is shown as a warning, for each tile."""
    s, pending = run.summary.get("this_start", run.summary), run.pending
    kind = "output" if run.per_token is None else "scored"
    last = ", last start" if s.get("earlier") else ""
    rows: list[tuple[str, str, bool]] = []
    # pass@1, and the last estimate of each kind, which uses all samples.
    last_of_kind = {each.name.rstrip("0123456789"): each for each in run.estimates or ()}
    for each in distinct(run.estimates or ()):
        if each.name == "pass@1" or each in last_of_kind.values():
            rows.append((f"{each.name}{each.interval('.1%')}", f"{each.value:.1%}", False))
    if run.without_verdict:
        rows.append(("samples without a verdict, counted as wrong", f"{run.without_verdict:,}", True))
    if run.unjudged:
        rows.append(("samples still to be judged; nothing is estimated before", f"{run.unjudged:,}", True))
    if run.estimates is not None and pending:
        rows.append(("of pass@k before all samples are there: short ones finish first", "no estimate", True))
    elif run.estimates == () and not run.unjudged:
        rows.append(("of pass@k: no sample has a verdict", "no estimate", True))
    if run.per_token is not None and len(run.per_token.of_texts):
        rows.append(("log-probability per token, all texts together", f"{run.per_token.mean:,.3f}", False))
        rows.append(("perplexity, all texts together", figure_text(math.exp(min(700.0, -run.per_token.mean))), False))
    rows += [
        (f"of {counted(run.samples, 'sample' if run.per_token is None else 'text')} ok", f"{run.ok:,}", False),
        (f"errors{_error_rows(run)}", f"{run.errors:,}", run.errors > 0),
    ]
    if run.cut_off:
        share = run.cut_off / max(1, run.ok)
        rows.append(("of the samples cut off at max_tokens or the end of the context", f"{share:.0%}", False))
    rows += [("cancelled, their rows had stopped", f"{run.cancelled:,}", False)] if run.cancelled else []
    rows += [("pending; to compute them, run the same command again", f"{pending:,}", True)] if pending else []
    seconds = float(elapsed(run.steps).max()) if len(run.steps.get("seconds", ())) else 0.0
    if s.get("earlier") and seconds and run.whole and not run.shared:
        # The summary covers the last start, the steps cover all. Tokens that a stop lost took time and count for nothing.
        speed = float(run.lengths.sum(dtype=np.int64)) / seconds
        rows.append(("of computing, all starts", seconds_text(seconds), False))
        rows.append((f"{kind} tokens a second of computing, all starts", f"{speed:,.0f}", False))
    elif s.get("steps"):
        kept = s.get("kept_tokens")
        lost = pending and kept is not None and kept < s["output_tokens"]
        also = ", unfinished samples included" if lost else ""
        rows.append((f"time, of which loading {seconds_text(s['load_seconds'])}{last}", seconds_text(s["seconds"]), False))
        rows.append((f"{kind} tokens a second after loading{also}{last}", f"{s['output_tokens_per_second']:,.0f}", False))
    if len(run.lengths):
        rows.append((f"{kind} tokens", f"{int(run.lengths.sum(dtype=np.int64)):,}", False))
    if s.get("cached_tokens"):
        share = f"{s['cached_tokens'] / s['prompt_tokens']:.1%}"
        rows.append(("of the prompt tokens shared and not computed again" + last, share, False))
    if s.get("tail_seconds"):
        share = f"{s['tail_seconds'] / s['step_seconds']:.0%}"
        rows.append(("of the time in the tail, with fewer than half of the samples still running" + last, share, False))
    if s.get("preemptions"):
        rows.append(("preemptions: samples set aside while the KV cache was full" + last, f"{s['preemptions']:,}", False))
    return rows


def _figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return title, note and SVG of each figure that has data."""
    figures: list[tuple[str, str, str]] = []
    bands: list[plots.Band] = []
    for kind in ("pass@", "maj@"):
        curve = [each for each in run.estimates or () if each.name.startswith(kind)]
        value, low, high = ([getattr(each, part) for each in curve] for part in ("value", "low", "high"))
        bands += [plots.Band(f"{kind}k", [int(e.name.removeprefix(kind)) for e in curve], value, low, high)] if curve else []
    if any(len(band.x) > 1 for band in bands):
        title, note = " and ".join(band.label for band in bands), "means over the rows, with 95% intervals"
        figures.append((title, note, plots.with_bands(bands, "k")))
    figures += row_figures(run)
    if run.per_token is not None and len(of_texts := run.per_token.of_texts):
        note = f"lowest {of_texts.min():,.2f}, median {np.median(of_texts):,.2f}, highest {of_texts.max():,.2f}"
        figures.append(("Log-probability per token", note, plots.histogram(of_texts, "of a text, natural logarithm", "texts")))
    if len(run.lengths):
        note = f"median {decimal_text(float(np.median(run.lengths)))}, longest {run.lengths.max():,}"
        title, unit = ("Output lengths", "output tokens of a sample") if run.per_token is None else ("Lengths", "scored tokens")
        figures.append((title, note, plots.histogram(run.lengths, unit, "samples" if run.per_token is None else "texts")))
    if len(run.steps.get("seconds", ())) > 1:
        figures += step_figures(run.steps, whole=run.whole, shared=run.shared, scores=run.per_token is not None)
    s = run.summary.get("this_start", run.summary)
    last = ", last start" if s.get("earlier") else ""
    if s.get("prompt_tokens"):
        counts = {"without sharing": s["prompt_tokens"], "computed": s["prefilled_tokens"]}
        # What could be shared is known of the whole plan; a part of it may have begun, or another process.
        if not run.pending and not run.cancelled and not run.shared:
            counts["least possible"] = s["prompt_tokens"] - s["cacheable_tokens"]
        bars = {label: (number, f"{number:,}") for label, number in counts.items()}
        saved = "where prompts begin alike, the common part is computed once"
        figures.append(("Prompt tokens", saved + last, _bars(bars)))
    if s.get("predicted_seconds") is not None:
        times = {"predicted": s["predicted_seconds"], "actual": s["step_seconds"]}
        note = f"time of all steps{last}; predicted by {s['predicted_by']}"
        if "roofline" in s["predicted_by"]:
            note += ", the time that the device's arithmetic and memory bandwidth alone would take"
            note += " (the least possible)" if times["predicted"] < times["actual"] else ""
        figures.append(
            ("Predicted and actual", note, _bars({each: (time, seconds_text(time)) for each, time in times.items()}))
        )
    return figures


def _bars(bars: Mapping[str, tuple[float, str]]) -> str:
    """Draw horizontal bars, each with the text of its value beside it."""
    longest = max(1e-12, *(value for value, _ in bars.values()))
    rows = (
        f"<span>{label}</span><div><i style='width:{80 * value / longest:.1f}%;background:{color}'></i>{_text(text)}</div>"
        for (label, (value, text)), color in zip(bars.items(), _COLORS, strict=False)
    )
    return f"<div class=bars>{''.join(rows)}</div>"
