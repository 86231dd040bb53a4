"""Decoding of byte-level vocabularies (GPT-2's scheme, used by Llama 3, Qwen and SmolLM): an id maps to bytes, and a text is
the bytes of its ids.

tokenizers' own decoding takes a lock and allocates a string for every token, so its threads block each other: 2,048 samples of
200 tokens take as long on sixteen cores as on one. Arrow gathers the bytes of all ids of a batch in one call, without Python's
lock, and leaves them side by side in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, pre_tokenizers

from tokabatch.arrays import Int32

Decode = Callable[[Sequence[Sequence[int] | Int32], bool], list[str]]
"""Decodes lists of ids; the flag leaves special tokens out. Raises IndexError for an id beyond the vocabulary."""
FEW_IDS = 64
"""Up to so many ids are joined one by one: a call of Arrow's costs 25 us."""


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

    gathered = {False: pa.array(pieces, pa.large_binary()), True: pa.array(plain, pa.large_binary())}

    def decode(batch: Sequence[Sequence[int] | Int32], skip_special_tokens: bool) -> list[str]:
        ends = np.cumsum([len(ids) for ids in batch])
        if not len(ends) or ends[-1] <= FEW_IDS:
            piece = (plain if skip_special_tokens else pieces).__getitem__
            return [b"".join(map(piece, ids)).decode("utf-8", errors="replace") for ids in batch]
        flat = np.concatenate([np.asarray(ids, np.int32) for ids in batch])
        chosen = gathered[skip_special_tokens].take(pa.array(flat))
        _, offsets, data = chosen.buffers()
        cuts = [0, *np.frombuffer(offsets, np.int64)[ends].tolist()]
        return [str(data[begin:end], "utf-8", "replace") for begin, end in pairwise(cuts)]

    return decode


def _alphabet() -> dict[int, int]:
    """Return the byte of each character of the scheme's alphabet."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    alphabet = {byte: byte for byte in own} | {256 + place: byte for place, byte in enumerate(others)}
    assert set(map(chr, alphabet)) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
