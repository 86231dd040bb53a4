"""The samples of a report page, each folded: its prompt, its text, its verdict and its row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from tokabatch.number_text import counted
from tokabatch.output.excerpts import Excerpt, Kind
from tokabatch.report.closing import judged_text, judged_values
from tokabatch.report.run_record import RunRecord

_CHARACTERS, _FOLDED, _BEGINNING = 4000, 700, 200
"""The most characters that are shown of a text, of a prompt without folding it, and of a sample that is folded."""
_SAID, _JUDGED = 100, ("extracted", "expected", "verify_score")
"""If a judge says more of a sample, its line says only these; the rest is shown where it is unfolded."""
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


def samples_shown(run: RunRecord) -> str:
    """Return the samples as HTML, under a heading for each kind."""
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
    """Return a folded sample: its prompt (folded again if it is long, below the row's own part of it), its text, and the
    columns of its row."""
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
    asked = shown = ""
    if prompt is not None and prompt.own_part:
        asked = f"<div class=prompt>Prompt: {escape(_beginning(prompt.own_part))}</div>"
        if len(prompt.text) > max(_FOLDED, len(prompt.own_part)):
            shown = _text_of("This row's part of the prompt", prompt.own_part)
    if prompt is not None:
        shown += _text_of("Prompt", prompt.text)
    name = f"row {sample.row_index:,}, {'text' if scored else 'sample'} {sample.sample_index:,}"
    return (
        f"<details><summary>{mark}{name} <small>{escape(ended)}</small>{asked}<div>{escape(_beginning(sample.text))}</div>"
        f"</summary>{shown}"
        f"<h3>{'Scored text' if scored else 'Sample'}</h3><pre>{escape(_cut(sample.text))}</pre>"
        f"{_table('Judged', judged)}{_table('Row', sample.columns)}</details>"
    )


def _text_of(title: str, text: str) -> str:
    label, shown = f"{title}, {counted(len(text), 'character')}", f"<pre>{escape(_cut(text))}</pre>"
    return f"<h3>{label}</h3>{shown}" if len(text) <= _FOLDED else f"<details><summary>{label}</summary>{shown}</details>"


def _beginning(text: str) -> str:
    """Return the beginning of a text on one line."""
    return " ".join(text[:_BEGINNING].split())


def _table(title: str, values: Mapping[str, Any]) -> str:
    """Return values by name under a title, long ones folded; nothing if there are none."""
    rows = "".join(f"<tr><th>{escape(name)}<td>{folded_value(value)}" for name, value in values.items())
    return f"<h3>{title}</h3><table class=keyed>{rows}</table>" if rows else ""


def folded_value(value: Any) -> str:
    """Return a value as HTML, folded if it is long."""
    if value is None:
        return "<small>null</small>"
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
    if len(text) <= _FOLDED:
        return escape(text)
    return f"<details><summary>{counted(len(text), 'character')}</summary>{escape(_cut(text))}</details>"


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} […]"
