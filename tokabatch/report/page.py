"""A run as a self-contained HTML page: figures first, then charts and samples. Reads no files and needs no engine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Float64
from tokabatch.errors import EXIT_ERRORS
from tokabatch.number_text import counted, decimal_text, figure_text, seconds_text
from tokabatch.output.excerpts import ErrorRows, Excerpt, Kind
from tokabatch.output.steps import elapsed
from tokabatch.report import plots
from tokabatch.report.closing import errors_section, judged_text, judged_values
from tokabatch.report.page_style import CSS
from tokabatch.report.step_figures import step_figures
from tokabatch.scoring.estimates import Estimate, distinct

_CHARACTERS, _FOLDED, _BEGINNING = 4000, 700, 200
"""The most characters that are shown of a text, of a prompt without folding it, and of a sample that is folded."""
PAGE_START = "<!doctype html><html lang=en><meta charset=utf-8>"
"""How each page begins, of earlier versions, too."""
_SHORT = ("Prompt tokens", "Predicted and actual")
"""Figures that half of the height is enough for."""
_SAID, _JUDGED = 100, ("extracted", "expected", "verify_score")
"""If a judge says more of a sample, its line says only these; the rest is shown where it is unfolded."""
_MEANINGS = {
    "pass@": "the chance that at least one of k samples of a row is right",
    "maj@": "the chance that the most frequent answer of k samples is right",
    "best-of-": "the score of the likeliest of k samples",
}
_COLORS = (plots.INK, "#9ec5fe", plots.SECOND)


@dataclass(frozen=True, slots=True)
class PerToken:
    """The mean log-probability per token of the scored texts: of each text, shape [texts], and over all tokens."""

    of_texts: Float64
    mean: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a page shows.

    `summary` is the run's summary.json, written by its last start. `steps` are columns over the steps of all starts, empty if
    none were recorded. `lengths` are the numbers of output tokens of the samples that are ok. `facts` describe the run as
    (label, value).
    """

    path: str
    model: str
    state: str
    samples: int
    ok: int
    errors: int
    cancelled: int
    lengths: npt.NDArray[np.int32]
    summary: Mapping[str, Any]
    steps: Mapping[str, Float64]
    estimates: tuple[Estimate, ...] | None
    """pass@k and the like; empty while samples are missing, None if nothing is verified."""
    facts: Sequence[tuple[str, str]] = ()
    error_rows: ErrorRows | None = None
    samples_shown: Mapping[Kind, Sequence[Excerpt]] = field(default_factory=dict[Kind, Sequence[Excerpt]])
    prompts: Mapping[int, str] = field(default_factory=dict[int, str])
    """The prompts of the samples shown, by row number, if they could be rebuilt."""
    without_verdict: int = 0
    """Samples that the judge could not judge."""
    right: int | None = None
    """Samples that are right; None if nothing is verified."""
    unjudged: int = 0
    """Samples that are still to be judged."""
    cut_off: int = 0
    """Samples that ended at max_tokens or at the end of the context."""
    verify: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The job's section."""
    per_token: PerToken | None = None
    """None unless the job scores given texts."""
    shared: bool = False
    """Whether several processes wrote it side by side, each with steps of its own."""

    @property
    def pending(self) -> int:
        """Samples that a later start has to compute."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def whole(self) -> bool:
        """Whether the steps are those of all samples: a start that was killed leaves none, which the counts do not show where
        samples were computed again (--retry-errors, --repair)."""
        tokens = float(self.lengths.sum(dtype=np.int64)) if self.per_token is None else 0.0
        finished, sampled = (float(np.sum(self.steps.get(name, 0.0))) for name in ("finished", "sampled"))
        return bool(self.summary.get("steps_of_all_starts", True)) and finished >= self.ok and sampled >= tokens


def render_page(run: RunRecord) -> str:
    """Return the page as HTML."""
    tiles = [
        f"<div class=tile><b{' class=bad' if alert else ''}>{_text(v)}</b><span>{_text(k)}</span></div>"
        for k, v, alert in _tiles(run)
    ]
    cells = _cells(_figures(run))
    # Four side by side in rows of three would leave one alone.
    least = "26rem" if len(cells) == 4 else "21rem"
    return (
        f"{PAGE_START}<meta name=viewport content='width=device-width'>"
        f"<title>tokabatch report: {escape(run.path)}</title><style>{CSS}</style>"
        f"<h1><small>tokabatch report</small>{escape(run.path)}</h1>"
        f"<p class=sub>model {escape(run.model)}, {escape(_state(run))}{escape(_started(run))}</p>"
        f"<div class=tiles style='--columns:{_columns(len(tiles))}'>{''.join(tiles)}</div>{_meanings(run)}{_errors(run)}"
        f"<div class=plots style='--least:{least}'>{''.join(cells)}</div>"
        f"{_samples(run)}{_facts(run)}</html>\n"
    )


def _cells(figures: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the figures as HTML. Two short ones are stacked where that fills rows of three."""
    drawn = [
        f"<figure><figcaption>{escape(title)}<small>{_text(note)}</small></figcaption>{drawing}</figure>"
        for title, note, drawing in figures
    ]
    short = [place for place, (title, _, _) in enumerate(figures) if title in _SHORT]
    if len(short) < 2 or (len(drawn) - 1) % 3:
        return drawn
    stack = f"<div class=stack>{''.join(drawn[place] for place in short)}</div>"
    return [*(figure for place, figure in enumerate(drawn) if place not in short), stack]


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
    said += ["In brackets: 95% intervals over the rows."] if any(each.interval(".1%") for each in shown) else []
    return f"<p class=sub>{' '.join(said)}</p>" if said else ""


def _errors(run: RunRecord) -> str:
    if run.error_rows is None or not run.error_rows.rows:
        return ""
    section = errors_section(run.error_rows)
    head = "".join(f"<th>{escape(name)}" for name in section.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in section.rows)
    return f"<h2>Error rows</h2><table class=errors><tr>{head}{rows}</table>"


_TITLES: dict[Kind, str] = {
    "right": "Right samples",
    "wrong": "Wrong samples",
    "first": "Samples",
    "longest": "Longest of the other samples, one of each row",
}
_TITLES_OF_SCORED: dict[Kind, str] = {
    "wrong": "Wrong choices: continuations that are likeliest in their row, but not right",
    "right": "Right choices",
    "lowest": "Lowest log-probability per token of the other texts, one of each row",
    "highest": "Highest log-probability per token of the other texts, one of each row",
}


def _samples(run: RunRecord) -> str:
    titles = dict(_TITLES if run.per_token is None else _TITLES_OF_SCORED)
    if run.per_token is None and _shows_unjudged(run):
        titles["wrong"] = "Wrong samples, and those without a verdict"
    if run.per_token is not None and not {"right", "wrong"} & run.samples_shown.keys():
        titles["lowest"] = "Lowest log-probability per token, one text of each row"
    # Of samples that were cut off at one length, or are all alike, any would do.
    ends = {(each.finish_reason, each.num_output_tokens) for each in run.samples_shown.get("longest", ())}
    cut_off = len(ends) == 1 and next(iter(ends))[0] == "length"
    if cut_off or (len(run.lengths) and run.lengths.min() == run.lengths.max()):
        titles.pop("longest", None)
    parts = [
        f"<h2>{title}{_of_all(run, kind)}</h2>{''.join(_sample(each, run) for each in run.samples_shown[kind])}"
        for kind, title in titles.items()
        if run.samples_shown.get(kind)
    ]
    return "".join(parts)


def _of_all(run: RunRecord, kind: Kind) -> str:
    """Return how many samples of a kind are shown, and of how many, where that is known."""
    right, without = run.right or 0, 0 if _shows_unjudged(run) else run.without_verdict
    number = {"first": run.ok, "right": right, "wrong": run.ok - right - without}.get(kind)
    if number is None or run.per_token is not None or (kind != "first" and (run.right is None or run.unjudged)):
        return ""
    return f" <small>{len(run.samples_shown[kind]):,} of {number:,}</small>"


def _shows_unjudged(run: RunRecord) -> bool:
    return any(each.unjudged for each in run.samples_shown.get("wrong", ()))


def _sample(sample: Excerpt, run: RunRecord) -> str:
    """Return a folded sample: its prompt (folded again if it is long), its text, and the columns of its row."""
    prompt, judged = run.prompts.get(sample.row_index), judged_values(sample, run.verify)
    scored = sample.finish_reason == "scored"
    mark = "<b class=good>right</b> " if sample.correct else "" if sample.correct is None else "<b class=bad>wrong</b> "
    if sample.unjudged:
        mark = f"<b class=bad>no verdict</b> <small>({escape(sample.unjudged)})</small> "
    ended = counted(sample.num_output_tokens, "token")
    if sample.logprob is not None and scored:
        per_token = sample.logprob / max(1, sample.num_output_tokens)
        ended += f", log-probability {sample.logprob:,.2f}, {per_token:,.2f} per token"
    ended += ", cut off" if sample.finish_reason == "length" else ""
    said = judged_text(judged)
    if len(said) > _SAID:
        said = judged_text({name: judged[name] for name in _JUDGED if name in judged})
    ended += f"; {said}" if said else ""
    shown = ""
    if prompt is not None:
        text = f"<pre>{escape(_cut(prompt))}</pre>"
        label = f"Prompt, {counted(len(prompt), 'character')}"
        shown = f"<h3>{label}</h3>{text}" if len(prompt) <= _FOLDED else f"<details><summary>{label}</summary>{text}</details>"
    beginning = " ".join(sample.text[:_BEGINNING].split())
    name = f"row {sample.row_index:,}, {'text' if scored else 'sample'} {sample.sample_index:,}"
    return (
        f"<details><summary>{mark}{name} <small>{escape(ended)}</small><div>{escape(beginning)}</div></summary>{shown}"
        f"<h3>{'Scored text' if scored else 'Sample'}</h3><pre>{escape(_cut(sample.text))}</pre>"
        f"{_table('Judged', judged)}{_table('Row', sample.columns)}</details>"
    )


def _table(title: str, values: Mapping[str, Any]) -> str:
    """Return values by name under a title, long ones folded; nothing if there are none."""
    rows = "".join(f"<tr><th>{escape(name)}<td>{_value(value)}" for name, value in values.items())
    return f"<h3>{title}</h3><table class=keyed>{rows}</table>" if rows else ""


def _value(value: Any) -> str:
    if value is None:
        return "<small>null</small>"
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
    if len(text) <= _FOLDED:
        return escape(text)
    return f"<details><summary>{counted(len(text), 'character')}</summary>{escape(_cut(text))}</details>"


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} […]"


def _facts(run: RunRecord) -> str:
    rows = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in run.facts)
    return f"<h2>The run</h2><table class=keyed>{rows}</table>" if rows else ""


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
    if run.per_token is not None and len(run.per_token.of_texts):
        rows.append(("log-probability per token, all texts together", f"{run.per_token.mean:,.3f}", False))
        rows.append(("perplexity, all texts together", figure_text(math.exp(min(700.0, -run.per_token.mean))), False))
    rows += [
        (f"of {counted(run.samples, 'sample' if run.per_token is None else 'text')} ok", f"{run.ok:,}", False),
        ("errors", f"{run.errors:,}", run.errors > 0),
    ]
    if run.cut_off:
        share = run.cut_off / max(1, run.ok)
        rows.append(("of the samples cut off at max_tokens or the end of the context", f"{share:.0%}", share >= 0.5))
    rows += [("cancelled, their rows had stopped", f"{run.cancelled:,}", False)] if run.cancelled else []
    rows += [("pending, still to be computed", f"{pending:,}", True)] if pending else []
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
        rows.append(("of the time with fewer than half of the samples running" + last, share, False))
    if s.get("preemptions"):
        rows.append(("preemptions" + last, f"{s['preemptions']:,}", False))
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
        figures.append(("Prompt tokens", "how much shared prefixes saved" + last, _bars(bars)))
    if s.get("predicted_seconds") is not None:
        times = {"predicted": s["predicted_seconds"], "actual": s["step_seconds"]}
        roofline = " (the least possible)" if "roofline" in s["predicted_by"] and times["predicted"] < times["actual"] else ""
        note = f"time of all steps{last}; predicted by {s['predicted_by']}{roofline}"
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
