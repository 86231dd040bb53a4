"""Special tokens that a row spells out, told from those that the job's templates and the model's chat template write.

A prompt is rendered as it is, so whatever a template computes with a row's value is computed with the true text. Where a row
may spell a special token, it is rendered once more with the special texts in the templates blanked out: where the two agree but
for the blanks, the blanks are what the templates wrote, and every other special token is the row's. A token that the template
begins or ends (`<|{{ role }}|>`) is the template's. This module knows no tokenizer, only its special texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from typing import Any, cast

BLANK = "\x7f"
"""A character that no template treats unlike any other, and that JSON does not escape."""
COMMON, LESS_COMMON = "_-'\".,:;!?()*#/", "<>[]{}=+&"
"""Punctuation by how often texts have it; other characters are rarer."""

Span = tuple[int, int]
Blank = Callable[[str], str]


def as_written(source: str) -> str:
    """Blanks nothing."""
    return source


class Blanking:
    """For the special texts of one tokenizer; `normalized` where it finds some of them in normalised text only, which other
    characters may turn into."""

    def __init__(self, texts: Iterable[str], normalized: bool = False) -> None:
        self._texts = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
        self._suspicious = _suspicious(self._texts, normalized)
        self._blank_all = cache(self.blanked)

    @cached_property
    def _sites(self) -> re.Pattern[str]:
        """Whole special texts, longest first; beginnings in front of a quote or a tag, and ends behind one."""
        texts = self._texts
        begins = _alternatives(text[:end] for text in texts for end in range(1, len(text)))
        ends = _alternatives(text[begin:] for text in texts for begin in range(1, len(text)))
        parts = [_alternatives(texts)] if texts else []
        parts += [f"{begins}(?=\\{{[{{%#]|['\"])"] if begins else []
        parts += [f"(?:(?<=[}}%#]\\}})|(?<=['\"])){ends}"] if ends else []
        return re.compile("|".join(parts) or "(?!)")

    def may_occur(self, value: Any) -> bool:
        """Whether a special text may come out of a value, or of anything in lists and mappings, whatever is done with it."""
        if isinstance(value, str):
            return self._suspicious.search(value) is not None
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value)
            return any(map(self.may_occur, items)) or any(map(self.may_occur, items.values()))
        return isinstance(value, list | tuple) and any(map(self.may_occur, cast("list[Any]", value)))

    def sites(self, source: str) -> list[Span]:
        """Where a template's source spells special texts, or the beginning or end of one around what it inserts."""
        return [found.span() for found in self._sites.finditer(source)]

    def blanked(self, source: str, site: Span | None = None) -> str:
        """The source with all its sites blanked, or one alone."""
        for begin, end in self.sites(source) if site is None else [site]:
            source = source[:begin] + re.sub(r"\S", BLANK, source[begin:end]) + source[end:]
        return source

    def written_by(self, render: Callable[[Blank], str | None]) -> list[Span]:
        """The parts of special texts that templates wrote into `render(as_written)`. `render` renders the same row with each
        template's source, and each special text that it is given by name, put through its argument; None where that fails."""
        text = render(as_written) or ""
        sources: dict[str, None] = {}

        def blank_all(source: str) -> str:
            sources[source] = None
            return self._blank_all(source)

        spans = _blanks(text, render(blank_all))
        if spans is not None:
            return spans
        # A template computes with a special text that it spells: blank them one by one, and leave out those.
        sites = [(source, site) for source in sources for site in self.sites(source)]
        alone = (_blanks(text, render(self._blank_one(*site))) for site in sites)
        return [span for spans in alone for span in spans or ()]

    def _blank_one(self, source: str, site: Span) -> Blank:
        return lambda given: self.blanked(given, site) if given == source else given


def _blanks(text: str, blanked: str | None) -> list[Span] | None:
    """Where `blanked` has blanks and `text` has not; None where they differ in anything else."""
    if blanked is None or len(text) != len(blanked):
        return None
    spans = [found.span() for found in re.finditer(f"{BLANK}+", blanked)]
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), len(text)]
    if any(text[end:begin] != blanked[end:begin] for end, begin in zip(ends, begins, strict=True)):
        return None
    return [(at, at + 1) for begin, end in spans for at in range(begin, end) if text[at] != BLANK]


def _suspicious(texts: list[str], normalized: bool) -> re.Pattern[str]:
    """Finds a character without which no special text can be, the rarest that will do. `&` may become any in HTML."""
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
