"""A run as one HTML page that needs nothing else: its figures first, then the curves. Knows no files and no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Float64
from tokabatch.report import plots
from tokabatch.report.summary import seconds_text

_POINTS = 400
_CSS = """
body{font:15px/1.45 system-ui,sans-serif;color:#1f2328;margin:2rem auto;max-width:78rem;padding:0 1rem}
h1{font-size:1.35rem;margin:0}p.sub{color:#57606a;margin:.2rem 0 1.2rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.7rem;margin-bottom:1.4rem}
.tile{border:1px solid #d0d7de;border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.35rem}.tile span{color:#57606a;font-size:.82rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}
figure{margin:0;border:1px solid #d0d7de;border-radius:.5rem;padding:.7rem}
figcaption{font-weight:600;margin-bottom:.3rem}figcaption small{font-weight:400;color:#57606a;display:block}
svg{width:100%;height:auto}.bad{color:#b42318}
"""


@dataclass(frozen=True, slots=True)
class PassCurve:
    """pass@k at each k with the bounds of its 95 % confidence band."""

    ks: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that a page shows. `summary` is the run's summary.json, of its last start; `steps` the columns of all its steps,
    empty where none were recorded; `lengths` the output tokens of each sample that is ok."""

    path: str
    model: str
    state: str
    samples: int
    ok: int
    errors: int
    lengths: npt.NDArray[np.int32]
    summary: Mapping[str, Any]
    steps: Mapping[str, Float64]
    pass_band: PassCurve | None


def render_page(run: RunRecord) -> str:
    """The page as HTML text."""
    tiles = "".join(
        f"<div class=tile><b{' class=bad' if alert else ''}>{escape(v)}</b><span>{escape(k)}</span></div>"
        for k, v, alert in _tiles(run)
    )
    figures = "".join(
        f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{svg}</figure>"
        for title, note, svg in _figures(run)
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(run.path)}</title><style>{_CSS}</style>"
        f"<h1>{escape(run.path)}</h1><p class=sub>{escape(run.model)}, {escape(run.state)}</p>"
        f"<div class=tiles>{tiles}</div><div class=plots>{figures}</div></html>\n"
    )


def _tiles(run: RunRecord) -> list[tuple[str, str, bool]]:
    """Label, value, and whether it should worry the reader."""
    s, pending = run.summary, run.samples - run.ok - run.errors
    rows: list[tuple[str, str, bool]] = [
        (f"of {run.samples:,} samples ok", f"{run.ok:,}", False),
        ("errors", f"{run.errors:,}", run.errors > 0),
    ]
    rows += [("pending", f"{pending:,}", True)] if pending else []
    if s.get("steps"):
        last = ", last start" if s.get("earlier") else ""
        rows.append((f"of which loading {seconds_text(s['load_seconds'])}{last}", seconds_text(s["seconds"]), False))
        rows.append((f"output tokens a second{last}", f"{s['output_tokens_per_second']:,.0f}", False))
        rows.append((f"output tokens{last}", f"{s['output_tokens']:,}", False))
    if s.get("cacheable_tokens"):
        rows.append(("of the possible prefill saved", f"{s['cached_tokens'] / s['cacheable_tokens']:.1%}", False))
    if run.pass_band is not None and run.pass_band.ks:
        for place in {0, len(run.pass_band.ks) - 1}:
            rows.append((f"pass@{run.pass_band.ks[place]}", f"{run.pass_band.values[place]:.1%}", False))
    if s.get("step_seconds"):
        rows.append(("of the steps' time is the tail", f"{s['tail_seconds'] / s['step_seconds']:.0%}", False))
    if s.get("preemptions"):
        rows.append(("preemptions", f"{s['preemptions']:,}", False))
    return rows


def _figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Title, note and drawing of each figure that there is something to draw for."""
    figures: list[tuple[str, str, str]] = []
    if len(run.steps.get("seconds", ())) > 1:
        figures += _step_figures(run.steps)
    if len(run.lengths):
        note = f"median {np.median(run.lengths):,.0f}, longest {run.lengths.max():,}"
        figures.append(("Output lengths", note, plots.histogram(run.lengths, "output tokens of a sample")))
    band = run.pass_band
    if band is not None and band.ks:
        figures.append(("pass@k", "mean over problems", plots.with_band(band.ks, band.values, band.low, band.high, "k")))
    s = run.summary
    if s.get("prompt_tokens"):
        labels, values = (
            ("without sharing", "computed", "least possible"),
            (
                s["prompt_tokens"],
                s["prefilled_tokens"],
                s["prompt_tokens"] - s["cacheable_tokens"],
            ),
        )
        figures.append(("Prompt tokens", "how much shared prefixes saved", plots.bars(labels, values, "tokens")))
    if s.get("predicted_seconds") is not None:
        drawing = plots.bars(("predicted", "actual"), (s["predicted_seconds"], s["step_seconds"]), "seconds of all steps")
        figures.append(("Predicted and actual", f"the steps that were taken, by {s['predicted_by']}", drawing))
    return figures


def _step_figures(steps: Mapping[str, Float64]) -> list[tuple[str, str, str]]:
    edges, means = _thin(steps, ("running", "waiting", "pages", "capacity"))
    rates = _rates(steps, edges)
    total = float(steps["seconds"].sum())
    output, prefill = (
        plots.Curve("output", rates["sampled"], filled=True),
        plots.Curve("prefill", rates["prefill"], plots.SECOND),
    )
    drawn = plots.over_time(edges, [output, prefill], "tokens a second")
    running = [plots.Curve("running", means["running"], filled=True), plots.Curve("waiting", means["waiting"], plots.SECOND)]
    kv = [plots.Curve("in use", means["pages"] / np.maximum(means["capacity"], 1), filled=True)]
    return [
        ("Throughput", f"{len(steps['seconds']):,} steps in {seconds_text(total)}", drawn),
        ("KV cache in use", f"of {steps['capacity'].max():,.0f} pages", plots.over_time(edges, kv, "share of pages", 1.0)),
        ("Samples running and waiting", "", plots.over_time(edges, running, "samples")),
    ]


def _thin(steps: Mapping[str, Float64], names: Sequence[str]) -> tuple[Float64, dict[str, Float64]]:
    """At most `_POINTS` parts of equal time: where each ends, and the columns' time-weighted means in them."""
    seconds = steps["seconds"]
    ends = np.cumsum(seconds)
    parts = min(_POINTS, len(seconds))
    place = np.minimum((ends - seconds / 2) / ends[-1] * parts, parts - 1).astype(np.int64)
    present, place = np.unique(place, return_inverse=True)
    weight = np.bincount(place, weights=seconds)
    means = {n: np.bincount(place, weights=steps[n] * seconds) / np.maximum(weight, 1e-12) for n in names}
    return (present + 1) * (ends[-1] / parts), means


def _rates(steps: Mapping[str, Float64], edges: Float64) -> dict[str, Float64]:
    """Tokens a second between consecutive edges, from the running totals."""
    ends = np.concatenate(([0.0], np.cumsum(steps["seconds"])))
    spans = np.diff(edges, prepend=0.0)
    counts = {"sampled": steps["sampled"], "prefill": steps["tokens"] - steps["decoded"]}
    totals = {name: np.concatenate(([0.0], np.cumsum(values))) for name, values in counts.items()}
    return {n: np.diff(np.interp(edges, ends, total), prepend=0.0) / np.maximum(spans, 1e-12) for n, total in totals.items()}
