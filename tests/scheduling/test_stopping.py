"""Stop strings end a sample at the first token at which its whole text holds one, whatever the tokenizer does at the seams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokabatch.messages import SamplingParams
from tokabatch.scheduling.stopping import StopRules, TokenText


def byte_level() -> Tokenizer:
    """Bytes, and a few merges that swallow newlines, digits and half characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {char: index for index, char in enumerate(alphabet, 1)}
    merges = [("Ċ", "Ċ"), ("Q", ":"), ("Ċ", "Q"), ("ä", "½"), ("a", "Ċ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama-2-like: words, and bytes that only make text when a whole run of them is valid."""
    pieces = ["<eos>", "▁a", "b", "Q", ":", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def rules(tokenizer: Tokenizer, params: SamplingParams) -> StopRules:
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
    text = TokenText(pieces, lambda lists: tokenizer.decode_batch(lists, skip_special_tokens=True), {"<eos>": 0})
    return StopRules([params], [], tokenizer.get_vocab_size(), text)


def first_stop(checked: StopRules, tokens: list[int]) -> int | None:
    """How many tokens the sample has when the rules end it."""
    for count in range(1, len(tokens) + 1):
        so_far = np.array(tokens[:count], np.int32)
        if len(checked.suspects(so_far[-1:])) and checked.check([0], [so_far])[0] is not None:
            return count
    return None


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_first_token_at_which_the_whole_text_holds_the_string(kind, data):
    tokenizer = TOKENIZERS[kind]
    stop = data.draw(st.sampled_from(["\n\n", "\nQ:", "Q", "你", "é\n"]))
    parts = st.sampled_from(["a", "b", "Q", ":", "\n", "\n\n", "你", "é", "Q:", "\nQ"])
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if kind == "byte-fallback" and data.draw(st.booleans()):
        tokens = [6 + byte for byte in text.encode()]
    expected = next(
        (n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n], skip_special_tokens=True)), None
    )
    assert first_stop(rules(tokenizer, SamplingParams(stop=(stop,))), tokens) == expected


def test_a_stop_string_that_spells_a_special_token_means_the_token():
    checked = rules(TOKENIZERS["byte-level"], SamplingParams(stop=("<eos>", "zz")))
    outputs = [np.array(tokens, np.int32) for tokens in ([5, 6, 0], [5, 0, 6])]
    assert checked.check([0, 0], outputs) == [0, None]


def test_ids_of_other_parameters_do_not_stop():
    checked = StopRules([SamplingParams(stop_token_ids=(3,)), SamplingParams(ignore_eos=True)], [9], 20, None)
    assert checked.suspects(np.array([3, 4, 9], np.int32)).tolist() == [0, 2]
    outputs = [np.array([token], np.int32) for token in (3, 9, 3, 9)]
    assert checked.check([0, 0, 1, 1], outputs) == [3, 9, None, None]
