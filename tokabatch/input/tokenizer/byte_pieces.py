"""Decoding of byte-level vocabularies (GPT-2's scheme, which Llama 3, Qwen and SmolLM have): an id stands for some bytes, and a
text is the bytes of its ids.

tokenizers' own decoding takes a lock and allocates a string for every token, so that its threads hold each other up: 2,048
samples of 200 tokens take sixteen cores as long as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, pre_tokenizers

Decode = Callable[[Sequence[Sequence[int]], bool], list[str]]
"""Lists of ids, and whether special tokens are left out. Raises IndexError for an id beyond the vocabulary."""


def byte_level_decoding(backend: Tokenizer) -> Decode | None:
    """What gives the texts that `backend.decode_batch` gives; None where its decoder is another."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    alphabet = _alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        # Added tokens may be spelled in other characters, and stand for themselves then.
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
    """The byte that each character of the scheme's alphabet stands for."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    alphabet = {byte: byte for byte in own} | {256 + place: byte for place, byte in enumerate(others)}
    assert set(map(chr, alphabet)) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
