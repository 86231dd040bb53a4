"""Find special tokens in texts, and encode texts in which some of them are plain text.

They are found as the tokenizer finds them. Plain ones are encoded with a copy of the tokenizer in which each special token has
an alias that no text contains, with the same id and the same handling of spaces, and its own text has no meaning. Texts go
through the copy as a whole, so whatever depends on neighbouring pieces, or on being first, comes out as in the original.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

Occurrence = tuple[int, int, str]
"""A special token in a text: begin, end, its text."""
FIRST_LETTER, LETTERS, SECRET_LETTERS = 0x1200, 64, 16
"""Ethiopic syllables: letters without case, marks or compositions, which normalizers leave unchanged."""


class SpecialTokens:
    """The special tokens of a tokenizer; `added` are its added tokens by id."""

    def __init__(self, backend: Backend, added: Mapping[int, AddedToken]) -> None:
        self._backend = backend
        self._added = added
        self._special = {number: token for number, token in added.items() if token.special}
        self.texts = frozenset(str(token.content) for token in self._special.values())

    @cached_property
    def normalized(self) -> bool:
        """Whether some are matched in normalised text, where other characters may spell them, too: those declared so, and those
        among the model's own pieces."""
        found = (token.normalized or token.content in self._own_pieces for token in self._special.values())
        return self._backend.normalizer is not None and any(found)

    def find(self, texts: Sequence[str]) -> list[list[Occurrence | None]]:
        """Return the special tokens in each text, in order; None for one that the text does not spell, such as the id of
        unknown text."""
        if (pattern := self._found_by_text) is not None:
            return [[(*each.span(), each[0]) for each in pattern.finditer(text) if each[0] in self.texts] for text in texts]
        results: list[list[Occurrence | None]] = []
        for text, encoding in zip(texts, self._backend.encode_batch(list(texts), add_special_tokens=False), strict=True):
            places = zip(encoding.ids, encoding.offsets, strict=True)
            results.append([self._spelled_at(text, *place) for place in places if place[0] in self._special])
        return results

    def encode_quoted(self, batch: Sequence[tuple[str, Sequence[Occurrence]]]) -> list[list[int]]:
        """Return the ids of each text, in which exactly the given occurrences, in order, are special tokens."""
        return self._aliases.encode(batch) if batch else []

    @cached_property
    def _aliases(self) -> AliasEncoder:
        return AliasEncoder(self._backend, self._added)

    @cached_property
    def _own_pieces(self) -> Mapping[str, int]:
        """Pieces that the model finds in a text without merging: all but those of BPE."""
        model = self._backend.model
        merged = isinstance(model, models.BPE) and not model.ignore_merges
        return {} if merged else self._backend.get_vocab(with_added_tokens=False)

    @cached_property
    def _found_by_text(self) -> re.Pattern[str] | None:
        """Matches tokens that nothing but their text decides: the longest of the added tokens that are matched first."""
        if any(t.normalized or t.single_word or t.content in self._own_pieces for t in self._special.values()):
            return None
        first = sorted((str(t.content) for t in self._added.values() if not t.normalized), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, first)) or "(?!)")

    def _spelled_at(self, text: str, number: int, place: tuple[int, int]) -> Occurrence | None:
        """Return the token `number` if `text` spells it, without the spaces that it absorbs."""
        token, (begin, end) = self._special[number], place
        content, normalizer = str(token.content), self._backend.normalizer
        if token.lstrip and not content[:1].isspace():
            begin = end - len(text[begin:end].lstrip())
        if token.rstrip and not content[-1:].isspace():
            end = begin + len(text[begin:end].rstrip())
        same = text[begin:end] == content
        if not same and normalizer is not None:
            same = normalizer.normalize_str(text[begin:end]) == normalizer.normalize_str(content)
        return (begin, end, content) if same else None


class AliasEncoder:
    """A copy of a tokenizer with aliases for its special tokens; takes about as long to make as loading the tokenizer."""

    def __init__(self, backend: Backend, added: Mapping[int, AddedToken]) -> None:
        state = json.loads(backend.to_str())
        special = {str(token.content): number for number, token in added.items() if token.special}
        # Random, so that no row can contain it; ids do not depend on it.
        secret = _spelled(secrets.randbits(6 * SECRET_LETTERS), SECRET_LETTERS)
        self._aliases = {text: text[0] + secret + _spelled(number, 6) + text[-1] for text, number in special.items()}
        _rename(state["model"], self._aliases)
        self._backend = Backend.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
        names = {number: self._aliases.get(str(token.content), str(token.content)) for number, token in sorted(added.items())}
        self._backend.add_tokens([_copy(added[number], name) for number, name in names.items()])
        self._ids = {cast("int", self._backend.token_to_id(name)): number for number, name in names.items()}

    def encode(self, batch: Sequence[tuple[str, Sequence[Occurrence]]]) -> list[list[int]]:
        """Return the ids of each text, in which exactly the given occurrences, in order, are special tokens."""
        encodings = self._backend.encode_batch_fast([self._aliased(*each) for each in batch], add_special_tokens=False)
        return [[self._ids.get(token, token) for token in encoding.ids] for encoding in encodings]

    def _aliased(self, text: str, occurrences: Sequence[Occurrence]) -> str:
        parts: list[str] = []
        done = 0
        for begin, end, content in occurrences:
            parts += [text[done:begin], self._aliases[content]]
            done = end
        return "".join([*parts, text[done:]])


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Put the aliases into the vocabulary, so that the model itself makes no special token of a text."""
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1) for pair in model.get("merges") or ()}
    names = {text: alias for text, alias in names.items() if text not in merged}
    vocab = cast("dict[str, int] | list[list[Any]]", model["vocab"])
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _copy(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized
    )


def _spelled(number: int, length: int) -> str:
    return "".join(chr(FIRST_LETTER + (number >> 6 * place) % LETTERS) for place in range(length))
