"""Tell special tokens spelled out in a row from those that the job's templates and the model's chat template write.

A prompt is rendered as it is, so a template computes with the true text of each value. A row that may spell a special token is
rendered a second time, with the special texts in the templates blanked out. Where the two renderings agree except for the
blanks, the blanks are what the templates wrote, and every other special token comes from the row. A token that a template
begins or ends (`<|{{ role }}|>`) counts as the template's. Needs no tokenizer, only its special texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from typing import Any, cast

BLANK = "\x7f"
"""A character that no template treats specially and that JSON does not escape."""
COMMON, LESS_COMMON = "_-'\".,:;!?()*#/", "<>[]{}=+&"
"""Punctuation by how common it is in texts; other characters are rarer."""

Span = tuple[int, int]
Blank = Callable[[str], str]


def as_written(source: str) -> str:
    """Return the source unchanged."""
    return source


class Blanking:
    """Blanks out the special texts of one tokenizer. `normalized`: it matches some of them in normalised text only, which other
    characters may turn into."""

    def __init__(self, texts: Iterable[str], normalized: bool = False) -> None:
        self._texts = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
        self._suspicious = _suspicious(self._texts, normalized)
        self._blank_all = cache(self.blanked)

    @cached_property
    def _sites(self) -> re.Pattern[str]:
        """Matches whole special texts, longest first, their beginnings before a quote or a tag, and their ends after one."""
        texts = self._texts
        begins = _alternatives(text[:end] for text in texts for end in range(1, len(text)))
        ends = _alternatives(text[begin:] for text in texts for begin in range(1, len(text)))
        parts = [_alternatives(texts)] if texts else []
        parts += [f"{begins}(?=\\{{[{{%#]|['\"])"] if begins else []
        parts += [f"(?:(?<=[}}%#]\\}})|(?<=['\"])){ends}"] if ends else []
        return re.compile("|".join(parts) or "(?!)")

    def may_occur(self, value: Any) -> bool:
        """Return whether a template can produce a special text from a value, or from anything in its lists and mappings."""
        if isinstance(value, str):
            return self._suspicious.search(value) is not None
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value)
            return any(map(self.may_occur, items)) or any(map(self.may_occur, items.values()))
        return isinstance(value, list | tuple) and any(map(self.may_occur, cast("list[Any]", value)))

    def sites(self, source: str) -> list[Span]:
        """Return where a template's source spells special texts, or the beginning or end of one around an inserted value."""
        return [found.span() for found in self._sites.finditer(source)]

    def blanked(self, source: str, site: Span | None = None) -> str:
        """Return the source with all its sites blanked, or only the given one."""
        for begin, end in self.sites(source) if site is None else [site]:
            source = source[:begin] + re.sub(r"\S", BLANK, source[begin:end]) + source[end:]
        return source

    def written_by(self, render: Callable[[Blank], str | None]) -> list[Span]:
        """Return the spans of `render(as_written)` that are parts of special texts written by templates. `render` renders the
        row with each template's source, and each special text passed by name, put through its argument; it returns None on
        failure."""
        text = render(as_written) or ""
        sources: dict[str, None] = {}

        def blank_all(source: str) -> str:
            sources[source] = None
            return self._blank_all(source)

        spans = _blanks(text, render(blank_all))
        if spans is not None:
            return spans
        # A template computes with a special text that it spells: blank the sites one by one, and leave out those that change
        # the result.
        sites = [(source, site) for source in sources for site in self.sites(source)]
        alone = (_blanks(text, render(self._blank_one(*site))) for site in sites)
        return [span for spans in alone for span in spans or ()]

    def _blank_one(self, source: str, site: Span) -> Blank:
        return lambda given: self.blanked(given, site) if given == source else given


def _blanks(text: str, blanked: str | None) -> list[Span] | None:
    """Return the spans where `blanked` has blanks and `text` does not; None if they differ in anything else."""
    if blanked is None or len(text) != len(blanked):
        return None
    spans = [found.span() for found in re.finditer(f"{BLANK}+", blanked)]
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), len(text)]
    if any(text[end:begin] != blanked[end:begin] for end, begin in zip(ends, begins, strict=True)):
        return None
    return [(at, at + 1) for begin, end in spans for at in range(begin, end) if text[at] != BLANK]


def _suspicious(texts: list[str], normalized: bool) -> re.Pattern[str]:
    """Return a pattern for the fewest, rarest characters one of which every special text contains. `&` may become any character
    in HTML."""
    marks = [{c for c in text if not c.isalnum() and not c.isspace()} for text in texts]
    if not all(marks):
        return re.compile("")
    rarest_last = sorted(set[str]().union(*marks), key=lambda mark: (mark not in COMMON, mark not in LESS_COMMON, mark))
    chosen = dict.fromkeys(rarest_last)
    for mark in rarest_last:
        if all(each & (chosen.keys() - {mark}) for each in marks):
            del chosen[mark]
    found = "".join(map(re.escape, [*chosen, "&"]))
    return re.compile(f"[{found}\u0080-\U0010ffff]" if normalized else f"[{found}]") if texts else re.compile("(?!)")


def _alternatives(texts: Iterable[str]) -> str:
    listed = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text))
    return f"(?:{'|'.join(map(re.escape, listed))})" if listed else ""
