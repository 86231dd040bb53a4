"""The figures of a page that show a run over time, from the columns of its step record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tokabatch.arrays import Float64
from tokabatch.number_text import counted, seconds_text
from tokabatch.output.steps import REPLICA, elapsed
from tokabatch.report import plots

_POINTS = 400


def step_figures(
    steps: Mapping[str, Float64], *, whole: bool, shared: bool, scores: bool = False
) -> list[tuple[str, str, str]]:
    """Return title, note and SVG of the figures over time. `whole` says whether the steps are those of all samples, `shared`
    whether several processes made them side by side, each counting its own seconds, `scores` whether they score given texts,
    whose tokens are computed as those of prompts are."""
    edges, means = _thin(steps, ("running", "waiting", "pages", "capacity"))
    rates = _rates(steps, edges)
    total = float(elapsed(steps).max())
    output, prefill = (
        plots.Curve("output tokens", rates["sampled"], filled=True),
        plots.Curve("prompt tokens", rates["prefill"], plots.SECOND),
    )
    if scores:
        drawn = plots.over_time(edges, [plots.Curve("", rates["tokens"], filled=True)], "prompt and text tokens a second")
    else:
        drawn = plots.over_time(edges, [output, prefill], "tokens a second")
    running = [plots.Curve("running", means["running"], filled=True), plots.Curve("waiting", means["waiting"], plots.SECOND)]
    kv = [plots.Curve("in use", means["pages"] / np.maximum(means["capacity"], 1), filled=True)]
    number = len(steps["seconds"])
    note = f"{counted(number, 'step (pass through the model)', 'steps (passes through the model)')} in {seconds_text(total)}"
    note += ", of several processes one after another" if shared else ""
    note += "" if whole else ", without those of a start that was killed"
    return [
        ("Throughput", note, drawn),
        (
            "KV cache in use",
            "memory for attention's keys and values of the tokens so far, divided into "
            f"{counted(int(means['capacity'].max()), 'page')}",
            plots.over_time(edges, kv, "share of pages", 1.0),
        ),
        (
            "Samples running and waiting",
            f"at most {means['running'].max():,.0f} at once",
            plots.over_time(edges, running, "samples"),
        ),
    ]


def _thin(steps: Mapping[str, Float64], names: Sequence[str]) -> tuple[Float64, dict[str, Float64]]:
    """Divide the time into at most `_POINTS` equal parts. Return the end of each part in seconds and the time-weighted mean of
    each column in it, summed over the replicas."""
    seconds, ends, replica = steps["seconds"], elapsed(steps), steps[REPLICA].astype(np.int64)
    count, whole = int(replica.max()) + 1, float(ends.max())
    parts = max(1, min(_POINTS, len(seconds) // count))
    place = np.minimum((ends - seconds / 2) / whole * parts, parts - 1).astype(np.int64)
    present, place = np.unique(place, return_inverse=True)
    cell, cells = replica * len(present) + place, count * len(present)
    weight = np.maximum(np.bincount(cell, weights=seconds, minlength=cells), 1e-12)
    sums = {n: np.bincount(cell, weights=steps[n] * seconds, minlength=cells) for n in names}
    edges: Float64 = ((present + 1) * (whole / parts)).astype(np.float64)
    return edges, {n: (sums[n] / weight).reshape(count, -1).sum(axis=0) for n in names}


def _rates(steps: Mapping[str, Float64], edges: Float64) -> dict[str, Float64]:
    """Return tokens per second between consecutive edges, from the cumulative counts."""
    ends = elapsed(steps)
    order = np.argsort(ends, kind="stable")
    ends = np.append(0.0, ends[order])
    spans = np.diff(edges, prepend=0.0)
    counts = {"sampled": steps["sampled"], "prefill": steps["tokens"] - steps["decoded"], "tokens": steps["tokens"]}
    totals = {name: np.concatenate(([0.0], np.cumsum(values[order]))) for name, values in counts.items()}
    return {n: np.diff(np.interp(edges, ends, total), prepend=0.0) / np.maximum(spans, 1e-12) for n, total in totals.items()}
