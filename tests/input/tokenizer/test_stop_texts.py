"""What is said of stop strings before a sample is drawn."""

from __future__ import annotations

import shlex

import pytest
import yaml

from tokabatch.input.tokenizer.stop_texts import describe_stops, refuse_special
from tokabatch.input.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize("stop", [r"\nQuestion:", r"\n\n", r"a\tb", r"\r\n"])
def test_escapes_that_quotes_have_kept(stop: str, tokenizers: dict[str, Tokenizer]) -> None:
    (sentence,) = describe_stops({stop: "generation.stop"}, tokenizers["bos"], frozenset())
    meant = stop.replace(r"\n", "\n").replace(r"\t", "\t").replace(r"\r", "\r")
    assert f"generation.stop holds '{stop}': a backslash and" in sentence
    assert f'write "{stop}", in double quotes' in sentence and meant not in sentence
    # As a shell takes it.
    typed = sentence.rpartition("on a command line, ")[2].removesuffix(")")
    name, _, value = shlex.split(typed)[0].partition("=")
    assert (name, yaml.safe_load(value)) == ("generation.stop", meant)


def test_a_text_that_the_tokenizer_does_not_spell(tokenizers: dict[str, Tokenizer]) -> None:
    backend = tokenizers["plain"]
    assert (
        describe_stops({text: "generation.stop" for text in ("\n\n", "ä", "Q:", " x ", "\\boxed")}, backend, frozenset()) == ()
    )

    class Prefixing:
        """A tokenizer that puts a space in front of each text."""

        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
            return [list(map(ord, " " + text.strip())) for text in texts]

        def decode_batch(self, batch: list[list[int]]) -> list[str]:
            return ["".join(map(chr, ids)) for ids in batch]

    told = describe_stops({text: "generation.stop" for text in ("Q:", " Q", "a b", "end\n")}, Prefixing(), frozenset())
    assert [sentence.split(",")[0] for sentence in told] == ["warning: generation.stop holds 'end\\n'"]

    class Folding:
        """A tokenizer with lower case only."""

        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
            return [list(map(ord, text.lower())) for text in texts]

        def decode_batch(self, batch: list[list[int]]) -> list[str]:
            return ["".join(map(chr, ids)) for ids in batch]

    stops = {"END": "sampling_params.stop of row 3", "end": "generation.stop", "<|END|>": "generation.stop"}
    (sentence,) = describe_stops(stops, Folding(), frozenset(["<|END|>"]))
    assert sentence.startswith("warning: sampling_params.stop of row 3 holds 'END', which the tokenizer writes as 'end'")


def test_many_sentences_are_counted(tokenizers: dict[str, Tokenizer]) -> None:
    sentences = describe_stops({f"\\n{number}": "generation.stop" for number in range(5000)}, tokenizers["plain"], frozenset())
    assert len(sentences) == 4 and sentences[-1] == "warning: 4,997 more stop strings are like these"


def test_special_tokens_inside_a_stop_string() -> None:
    specials = frozenset(["<|end|>", "<s>"])
    assert refuse_special(["<s>", "x", "<|end|>"], specials) is None
    assert "stop holds '<|end|>\\n': special tokens such as '<|end|>'" in (refuse_special(["x", "<|end|>\n"], specials) or "")
