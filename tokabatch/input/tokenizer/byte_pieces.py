"""Decoding of byte-level vocabularies (GPT-2's scheme, used by Llama 3, Qwen and SmolLM): an id maps to bytes, and a text is
the bytes of its ids.

tokenizers' own decoding takes a lock and allocates a string for every token, so its threads block each other: 2,048 samples of
200 tokens take as long on sixteen cores as on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, pre_tokenizers

Decode = Callable[[Sequence[Sequence[int]], bool], list[str]]
"""Decodes lists of ids; the flag leaves special tokens out. Raises IndexError for an id beyond the vocabulary."""


def byte_level_decoding(backend: Tokenizer) -> Decode | None:
    """Return a function equivalent to `backend.decode_batch`; None if its decoder is not byte-level."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    alphabet = _alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        # Added tokens may contain other characters; those map to themselves.
        spelled = token.translate(alphabet) if alphabet.keys() >= set(map(ord, token)) else None
        pieces[number] = token.encode() if spelled is None else spelled.encode("latin-1")
    plain = pieces.copy()
    for number, token in backend.get_added_tokens_decoder().items():
        if token.special:
            plain[number] = b""

    def decode(batch: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        piece = (plain if skip_special_tokens else pieces).__getitem__
        return [b"".join(map(piece, ids)).decode("utf-8", errors="replace") for ids in batch]

    return decode


def _alphabet() -> dict[int, int]:
    """Return the byte of each character of the scheme's alphabet."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    alphabet = {byte: byte for byte in own} | {256 + place: byte for place, byte in enumerate(others)}
    assert set(map(chr, alphabet)) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
