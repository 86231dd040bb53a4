"""Right when the text is the reference, or one of them where the reference is a list.

`verify.options.normalize` says what both are compared as: `strip` (the default: white space around them aside), `lower` (letter
case aside, too), or `squad`: lower case, without punctuation and the articles a, an and the, runs of white space as one, as the
evaluation of SQuAD does (Rajpurkar et al., 2016).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any, cast

COLUMNS = {"extracted": str}
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NORMALIZE = {
    "strip": str.strip,
    "lower": lambda text: text.strip().lower(),
    "squad": lambda text: " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()),
}


def verify(text: str, row: Mapping[str, Any], *, answer: str, normalize: str = "strip") -> dict[str, Any]:
    """Return whether `text` equals a reference, a string or the `str` of a value. Raises ValueError for a null reference,
    an object, and binary data."""
    wanted = _expected(row, answer, normalize)
    extracted = _NORMALIZE[normalize](text)
    return {"score": extracted in wanted, "extracted": extracted}


def check_options(*, normalize: str = "strip") -> None:
    """Raise ValueError for an unknown way to normalise."""
    if not isinstance(cast("Any", normalize), str) or normalize not in _NORMALIZE:
        raise ValueError(f"verify.options.normalize is {normalize!r}; write one of {', '.join(_NORMALIZE)}")


def check(row: Mapping[str, Any], *, answer: str, normalize: str = "strip") -> None:
    """Raise ValueError if the reference is null, an object or binary data."""
    _expected(row, answer, normalize)


def expected(row: Mapping[str, Any], *, answer: str, normalize: str = "strip") -> list[str]:
    """Return the reference, or each of several, as texts are compared with it."""
    return _expected(row, answer, normalize)


def _expected(row: Mapping[str, Any], answer: str, normalize: str) -> list[str]:
    reference = row.get(answer)
    references = reference if isinstance(reference, list) else [reference]
    if not references or None in references:
        raise ValueError("the reference answer is null")
    if any(isinstance(each, (dict, bytes)) for each in references):
        raise ValueError("the reference answer is an object or binary data, not text, a number or a list of them")
    return [_NORMALIZE[normalize](str(each)) for each in references]
