"""The tokenizer's wrapper on small tokenizers made on the spot."""

from __future__ import annotations

import numpy as np

from tokabatch.input.tokenizer.tokenizer import Tokenizer


def test_round_trip_and_facts(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bos"]
    texts = ["the quick brown fox", "täglich 😀", "", " a"]
    ids = tokenizer.encode_batch(texts, add_special_tokens=True)
    assert all(row[0] == 0 for row in ids) and tokenizer.prefix_text == "<|bos|>"
    assert tokenizer.decode_batch([np.asarray(row, dtype=np.int32) for row in ids]) == texts
    assert tokenizer.decode_batch(ids, skip_special_tokens=False)[0] == "<|bos|>the quick brown fox"
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1, 323)
    assert tokenizers["plain"].prefix_text == ""
    assert set(tokenizers["chat"].chat_templates) == {"default"} and not tokenizer.chat_templates
    assert tokenizer.special_texts == {"<|bos|>", "<|eos|>", "<|start|>", "<|end|>"}


def test_piece_texts_are_what_each_id_adds(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["plain"]
    pieces = tokenizer.piece_texts()
    assert len(pieces) == tokenizer.vocab_size and pieces[0] == "" and not tokenizer.lone_bytes()
    ids = tokenizer.encode_batch(["the quick brown fox: 12 apples\n"], False)[0]
    assert "".join(pieces[token] for token in ids) == "the quick brown fox: 12 apples\n"
    assert any(piece.startswith(" ") and len(piece) > 1 for piece in pieces)
