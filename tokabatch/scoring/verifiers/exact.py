"""Right when the text is the reference, white space around either aside."""

from __future__ import annotations

from typing import Any


def verify(text: str, reference: Any) -> bool:
    """Whether `text` equals `reference`, a string or what `str` makes of it. ValueError for a null reference."""
    if reference is None:
        raise ValueError("the reference answer is null")
    return text.strip() == str(reference).strip()
