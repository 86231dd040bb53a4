"""What a report page shows of each row whose samples are judged: how many rows are right how often, and the hardest ones."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tokabatch.number_text import counted
from tokabatch.report import plots
from tokabatch.report.run_record import HardRow, RunRecord

_SHOWN, _ID, _ANSWER, _PROMPT = 10, 40, 80, 200
"""The rows that are not folded, and the most characters of an id, of an answer and of a prompt."""


def row_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return title, note and SVG of the histogram of the rows; none where rows have one sample, which pass@1 says all of."""
    counts = run.row_counts
    if counts is None or len(counts.row) < 2 or counts.samples.max() < 2:
        return []
    never, always = int((counts.right == 0).sum()), int((counts.right == counts.samples).sum())
    failed, unjudged = int((counts.ok == 0).sum()), int(((counts.ok > 0) & (counts.judged == 0)).sum())
    causes = [counted(failed, "error row")] if failed else []
    causes += [f"{counted(unjudged, 'row')} without a verdict"] if unjudged else []
    among = f" ({' and '.join(causes)} among them)" if causes else ""
    note = f"of {counted(len(counts.row), 'row')}, {never:,} without a right sample{among}"
    # Which samples a stopped row has depends on their verdicts: its share is biased.
    stopped = bool(run.cancelled)
    note += "; rows that were stopped have fewer samples" if stopped else f", {always:,} with all of them right"
    drawn = plots.histogram_of_shares(counts.right, counts.samples, "right samples of a row", "rows", mean=not stopped)
    return [("Right samples by row", note, drawn)]


def hardest_rows(run: RunRecord) -> str:
    """Return a table of the rows with the smallest share of right samples as HTML, most of them folded."""
    counts = run.row_counts
    if counts is None or not run.hardest or counts.samples.max() < 2:
        return ""
    of_all = f" <small>{len(run.hardest):,} of the {counted(len(counts.row), 'row')}, by their share of right samples</small>"
    first, more = run.hardest[:_SHOWN], run.hardest[_SHOWN:]
    folded = f"<details><summary>{counted(len(more), 'more row')}</summary>{_table(more, run)}</details>" if more else ""
    return f"<h2>Hardest rows{of_all}</h2>{_table(first, run)}{folded}"


def _table(rows: Sequence[HardRow], run: RunRecord) -> str:
    ids = any(each.id is not None for each in run.hardest)
    answers, expected, prompts = (
        any(each.answered for each in run.hardest),
        any(each.expected for each in run.hardest),
        any(_asked(each, run) for each in run.hardest),
    )
    names = ["row (id)" if ids else "row", "right"]
    names += [*(["most frequent answer"] if answers else []), *(["expected"] if expected else [])]
    names += ["prompt"] if prompts else []
    lines: list[str] = []
    for each in rows:
        cells = [f"{each.row_index:,}" + (f" ({_cut(each.id, _ID)})" if each.id is not None else "")]
        cells += [f"{each.right:,} of {each.samples:,}"]
        cells += [_answer(each)] if answers else []
        cells += [_cut(each.expected)] if expected else []
        cells += [_asked(each, run)] if prompts else []
        tagged = (f"<td data-name='{name}'>{escape(cell)}" for name, cell in zip(names, cells, strict=True))
        lines.append(f"<tr>{''.join(tagged)}")
    head = "".join(f"<th>{name}" for name in names)
    return f"<table class=rows><tr>{head}{''.join(lines)}</table>"


def _asked(row: HardRow, run: RunRecord) -> str:
    prompt = run.prompts.get(row.row_index)
    return _cut(prompt.own_part or prompt.text, _PROMPT) if prompt is not None else ""


def _answer(row: HardRow) -> str:
    if not row.answered:
        return "none found"
    if row.answered == 1 < row.samples:
        return "all different"
    return f"{_cut(row.answer or '')} ({row.answered:,} of {row.samples:,})"


def _cut(text: str, most: int = _ANSWER) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} […]"
