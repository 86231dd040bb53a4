"""Check stop strings before anything is sampled: which cannot be matched, and which no sample can contain.

A stop string that is the text of a special token means that token. Inside a longer string it would never match, because special
tokens are not part of a sample's text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Set
from typing import Protocol

_ESCAPE = re.compile(r"\\([nrt])")
_MEANT = {"n": "a newline", "r": "a carriage return", "t": "a tab"}
LISTED = 3
_BEFORE = "a"
"""Put in front of a text, where tokenizers may add a space before the first word or drop one."""


class Spells(Protocol):
    """The encoding and decoding part of a tokenizer."""

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...

    def decode_batch(self, batch: list[list[int]]) -> list[str]: ...


def refuse_special(stops: Iterable[str], special_texts: Set[str]) -> str | None:
    """Return why one of the stop strings cannot be matched, with the remedy: it contains a special token. None if all can."""
    for stop in stops:
        hidden = None if stop in special_texts else min((text for text in special_texts if text in stop), default=None)
        if hidden:
            return (
                f"stop holds {stop!r}: special tokens such as {hidden!r} are not part of the text; write {hidden!r} alone, or "
                "the text without it"
            )
    return None


def describe_stops(stops: Mapping[str, str], tokenizer: Spells, special_texts: Set[str]) -> tuple[str, ...]:
    """Return notes on stop strings that samples never, or hardly ever, contain; `stops` maps each to where it was written."""
    texts = [stop for stop in stops if stop not in special_texts]
    spelled = dict(zip(texts, _spelled(texts, tokenizer), strict=True))
    changed = [stop for stop in texts if stop not in spelled[stop]]
    behind = _spelled([_BEFORE + stop for stop in changed], tokenizer)
    never = {stop for stop, shown in zip(changed, behind, strict=True) if stop not in shown}
    sentences: list[str] = []
    for stop in texts:
        escape = _ESCAPE.search(stop)
        if escape:
            meant = json.dumps(_ESCAPE.sub(lambda found: found[0].encode().decode("unicode_escape"), stop), ensure_ascii=False)
            # A shell removes the outer quotes.
            typed = shlex.quote(f"{stops[stop]}={meant}")
            typed = f" (on a command line, {typed})" if [*stops.values()] == ["generation.stop"] else ""
            sentences.append(
                f"warning: {stops[stop]} holds '{stop}': a backslash and {escape[1]!r}, as single quotes and the command line "
                f"keep them; if {_MEANT[escape[1]]} is meant, write {meant}, in double quotes{typed}"
            )
        elif stop in never:
            sentences.append(
                f"warning: {stops[stop]} holds {stop!r}, which the tokenizer writes as {spelled[stop]!r}: a sample so written "
                "does not stop"
            )
    more = (f"warning: {len(sentences) - LISTED:,} more stop strings are like these",) if len(sentences) > LISTED else ()
    return (*sentences[:LISTED], *more)


def _spelled(texts: list[str], tokenizer: Spells) -> list[str]:
    """Return the texts after encoding and decoding."""
    return tokenizer.decode_batch(tokenizer.encode_batch(texts, add_special_tokens=False)) if texts else []
