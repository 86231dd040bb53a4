"""Stop strings end a sample at the first token at which its whole text holds one, whatever the tokenizer does at the seams."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.generated import Outputs
from tokabatch.scheduling.stop_conditions import PARTIAL, PossibleEnds, StopRules, TokenText


def byte_level() -> Backend:
    """Bytes, and a few merges that swallow newlines, digits and half characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {char: index for index, char in enumerate(alphabet, 1)}
    merges = [("Ċ", "Ċ"), ("Q", ":"), ("Ċ", "Q"), ("ä", "½"), ("a", "Ċ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Backend(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def byte_fallback() -> Backend:
    """Llama-2-like: words, bytes that only make text when a whole run of them is valid, and a leading space that goes."""
    pieces = ["<eos>", "▁a", "b", "Q", ":", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


TOKENIZERS = {
    name: Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), name)
    for name, backend in (("byte-level", byte_level()), ("byte-fallback", byte_fallback()))
}


def rules(tokenizer: Tokenizer, params: SamplingParams) -> StopRules:
    text = TokenText(tokenizer.piece_texts(), tokenizer.decode_batch, {"<eos>": 0}, tokenizer.lone_bytes())
    return StopRules([params], [], tokenizer.vocab_size + 1, text)


def first_stop(checked: StopRules, tokens: list[int]) -> int | None:
    """How many tokens the sample has when the rules end it: by its whole output, and by what is noted of its last tokens."""
    outputs, slot = Outputs(1, -1), np.zeros(1, np.int64)
    nothing = np.zeros((1, 0), np.int32)
    for count in range(1, len(tokens) + 1):
        so_far = np.array(tokens[:count], np.int32)
        outputs.append(slot, so_far[-1:], np.zeros(1, np.float32), nothing, nothing.view(np.float32))
        suspect = len(checked.suspects(so_far[-1:])) > 0
        ended = checked.check([0], [so_far])[0] if suspect else None
        assert checked.find(so_far[-1:], slot, np.zeros(1, np.int32), outputs) == ({} if ended is None else {0: ended})
        if ended is not None:
            return count
    return None


def first_in_text(tokenizer: Tokenizer, tokens: list[int], stops: Sequence[str]) -> int | None:
    """The same, by decoding all of the text after each token."""
    texts = tokenizer.decode_batch([tokens[:count] for count in range(1, len(tokens) + 1)])
    return next((count for count, text in enumerate(texts, 1) if any(stop in text for stop in stops)), None)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_first_token_at_which_the_whole_text_holds_the_string(kind, data):
    tokenizer = TOKENIZERS[kind]
    stop = data.draw(st.sampled_from(["\n\n", "\nQ:", "Q", "你", "é\n"]))
    parts = st.sampled_from(["a", "b", "Q", ":", "\n", "\n\n", "你", "é", "Q:", "\nQ"])
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    tokens = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    if kind == "byte-fallback" and data.draw(st.booleans()):
        tokens = [6 + byte for byte in text.encode()]
    assert first_stop(rules(tokenizer, SamplingParams(stop=(stop,))), tokens) == first_in_text(tokenizer, tokens, [stop])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_tokens_and_any_strings(kind, data):
    """Special tokens, half characters and ids that the tokenizer has not, in any order; strings that the text may hold."""
    tokenizer = TOKENIZERS[kind]
    some = st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6 + 0x41, 6 + 0xE4, 6 + 0xBD, 6 + 0xA0, tokenizer.vocab_size])
    tokens = data.draw(st.lists(some | st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=24))
    text = tokenizer.decode_batch([tokens])[0]
    begins = st.integers(0, max(len(text) - 1, 0))
    parts = st.builds(lambda begin, size: text[begin : begin + size], begins, st.integers(1, 14))
    drawn = dict.fromkeys(data.draw(st.lists(parts, min_size=1, max_size=4)))
    stops = tuple(stop for stop in drawn if stop and PARTIAL not in stop) or ("x",)
    assert first_stop(rules(tokenizer, SamplingParams(stop=stops)), tokens) == first_in_text(tokenizer, tokens, stops)


def test_what_is_noted_is_what_the_tokens_say():
    """Rules shared by many samples, which note what the first of them ended in: the same as rules that have noted nothing."""
    tokenizer = TOKENIZERS["byte-level"]
    parts = ["a", "b", "Q", ":", "\n", "\n\n", "你", "é", "Q:", "\nQ"]
    rng = np.random.default_rng(0)
    shared = rules(tokenizer, SamplingParams(stop=("\nQ:", "bb")))
    for _ in range(300):
        tokens = tokenizer.encode_batch(["".join(rng.choice(parts, rng.integers(1, 40)))], False)[0]
        assert first_stop(shared, tokens) == first_in_text(tokenizer, tokens, ["\nQ:", "bb"])
    assert shared._noted


def test_special_tokens_between_the_tokens_of_a_string_count_for_nothing():
    tokenizer = TOKENIZERS["byte-level"]
    a, b, c = (tokenizer.encode_batch([letter], False)[0][0] for letter in "abc")
    checked = rules(tokenizer, SamplingParams(stop=("abc",)))
    for specials in range(6):
        assert first_stop(checked, [a, b, *[0] * specials, c]) == 3 + specials


def test_a_byte_that_spoils_a_run_of_bytes_spoils_the_string():
    tokenizer = TOKENIZERS["byte-fallback"]
    tokens = [6 + byte for byte in b"\xffABC"]
    assert first_in_text(tokenizer, tokens, ["C"]) is None
    assert first_stop(rules(tokenizer, SamplingParams(stop=("C",))), tokens) is None


def test_the_string_that_begins_first_is_the_reason():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = np.array(tokenizer.encode_batch(["xaQ:"], False)[0], np.int32)
    for stops, reason in ((("Q:", "aQ"), "aQ"), (("aQ:", "aQ"), "aQ"), (("Q:", ":"), "Q:")):
        assert rules(tokenizer, SamplingParams(stop=stops)).check([0], [tokens]) == [reason]


def test_ten_thousand_strings_are_ready_at_once():
    pieces = ["".join(letters) for letters in itertools.product("abcdefghijklmnopqrstuvwxyz ", repeat=3)]
    text = TokenText(pieces, TOKENIZERS["byte-level"].decode_batch, {})
    params = [SamplingParams(stop=(f"\nrow {row} ends",)) for row in range(10_000)]
    began = time.process_time()
    checked = StopRules(params, [], len(pieces), text)
    assert time.process_time() - began < 2
    suspects = [pieces[token] for token in checked.suspects(np.arange(len(pieces), dtype=np.int32))]
    assert suspects == [piece for piece in pieces if piece.startswith(("s", "ds", "nds"))]


def test_further_strings_look_at_drawn_tokens_alone_and_find_what_the_whole_vocabulary_would_show():
    """A server gets strings with each request, while steps wait."""

    class Counted(list[str]):
        looked_at = 0

        def __getitem__(self, at: object) -> object:
            self.looked_at += 1
            return super().__getitem__(at)  # type: ignore[index]

        def __iter__(self) -> Iterator[str]:
            raise AssertionError("the vocabulary is gone through")

    pieces = Counted(TOKENIZERS["byte-level"].piece_texts())
    checked = StopRules([SamplingParams()], [0], len(pieces), TokenText(pieces, TOKENIZERS["byte-level"].decode_batch, {}))
    everything, texts = np.arange(len(pieces), dtype=np.int32), TOKENIZERS["byte-level"].piece_texts()
    assert checked.suspects(everything).tolist() == [0] and not pieces.looked_at
    listed: list[str] = []
    for stop in ("Q:", "b\n", "zebra"):
        checked.extend([SamplingParams(stop=(stop,))])
        listed.append(stop)
        before = pieces.looked_at
        checked.suspects(everything[[5, 5, 6]])
        assert pieces.looked_at <= before + 2
    ends = PossibleEnds(listed)
    wanted = [token for token in everything.tolist() if token == 0 or ends.may_be_in(texts[token])]
    assert checked.suspects(everything).tolist() == wanted and 1 < len(wanted) < len(pieces)


def test_a_stop_string_that_spells_a_special_token_means_the_token():
    checked = rules(TOKENIZERS["byte-level"], SamplingParams(stop=("<eos>", "zz")))
    outputs = [np.array(tokens, np.int32) for tokens in ([5, 6, 0], [5, 0, 6])]
    assert checked.check([0, 0], outputs) == [0, None]


def test_ids_of_other_parameters_do_not_stop():
    checked = StopRules([SamplingParams(stop_token_ids=(3,)), SamplingParams(ignore_eos=True)], [9], 20, None)
    assert checked.suspects(np.array([3, 4, 9], np.int32)).tolist() == [0, 2]
    outputs = [np.array([token], np.int32) for token in (3, 9, 3, 9)]
    assert checked.check([0, 0, 1, 1], outputs) == [3, 9, None, None]


def test_what_the_least_tokens_complete_ends_nothing_then_or_later():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = np.array(tokenizer.encode_batch(["abxabxxab"], False)[0], np.int32)
    for least, found in ((0, 2), (1, 2), (2, 5), (4, 5), (5, 9), (9, None)):
        checked = rules(tokenizer, SamplingParams(stop=("ab", "zz"), min_tokens=least))
        assert first_stop(checked, tokens.tolist()) == found
    # A later token that may end one string is not taken for the end of an early one.
    for least, found in ((2, 5), (5, 7), (7, 9)):
        checked = rules(tokenizer, SamplingParams(stop=("ab", "bxx"), min_tokens=least))
        assert first_stop(checked, tokens.tolist()) == found
