"""Byte-level decoding gives the texts that tokenizers gives, of any ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from tokabatch.input.tokenizer.byte_pieces import byte_level_decoding
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.job import ModelConfig


def test_texts_of_any_ids_are_those_of_tokenizers(tokenizer_folders: dict[str, Path]) -> None:
    rng, backend = np.random.default_rng(0), Tokenizer.from_file(str(tokenizer_folders["bos"] / "tokenizer.json"))
    backend.add_tokens(["two words", "näher", AddedToken("<think>", special=False)])
    backend.add_special_tokens([AddedToken("<|late one|>")])
    decode = byte_level_decoding(backend)
    assert decode is not None
    # Bytes in any order: most of these texts hold some that are no UTF-8.
    batch = [rng.integers(0, backend.get_vocab_size(), rng.integers(0, 40)).tolist() for _ in range(3000)]
    for skip in (False, True):
        texts = backend.decode_batch(batch, skip_special_tokens=skip)
        assert decode(batch, skip) == texts
        assert decode([np.array(ids, np.int32) for ids in batch], skip) == texts
        assert [text for ids in batch[:500] for text in decode([ids], skip)] == texts[:500]
        assert sum("\ufffd" in text for text in texts) > 1000 and any("two words" in text for text in texts)


@pytest.mark.parametrize("times", [1, 100])
def test_a_tokenizer_that_is_ready_decodes_the_same_with_ids_beyond_its_vocabulary(
    times: int, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tokenizer_folders["plain"])))
    ids = tokenizer.encode_batch(["the quick täglich 😀"], add_special_tokens=False)[0]
    batch = [np.array(ids * times, np.int32), np.array([*ids, 1 << 20] * times, np.int32)]
    before = tokenizer.decode_batch(batch)
    tokenizer.get_ready_to_decode()
    assert tokenizer.decode_batch(batch) == before
    monkeypatch.setattr(tokenizer, "_backend", None)
    assert tokenizer.decode_batch(batch[:1]) == before[:1]


def test_another_decoder_is_left_to_tokenizers() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert byte_level_decoding(backend) is None
    backend.decoder = decoders.Fuse()
    assert byte_level_decoding(backend) is None
