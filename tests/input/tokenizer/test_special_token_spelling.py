"""Special tokens that rows spell are text and those of templates tokens, to the id, whatever tokenizer and whatever template.

What is expected comes from a twin of each tokenizer, in which the special tokens have other texts: the templates' are written
so, and the row's text goes in as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tokabatch.errors import RowError
from tokabatch.input.prompts.blanking import BLANK, Blanking
from tokabatch.input.prompts.builder import Limits, PromptBuilder
from tokabatch.input.rows import Row
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import Job

OWN = {"a": "<|a|>", "b": "<|b|>", "s": "<s>", "user": "<|user|>", "unk": "<unk>"}
TWIN = {"a": "{ß1ß}", "b": "{ß2ß}", "s": "{ß3ß}", "user": "{ß4ß}", "unk": "{ß5ß}"}
LETTERS = [*"abcdehiklnorstuwxyQ:.|<>/_é0123456789{}[]\"'\\", "▁", " ", "\n", "Ġ", "ab", "hi", "▁a", "▁hi", "<|", "|>"]


def unigram(names: dict[str, str], scheme: str) -> Backend:
    """As T5 and XLM-RoBERTa: the model's own pieces hold the special texts, at the best score."""
    pieces = [*((name, 0.0) for name in names.values()), *((letter, -3.0) for letter in LETTERS)]
    backend = Backend(models.Unigram(pieces, unk_id=4))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return backend


def metaspace_bpe(names: dict[str, str], scheme: str) -> Backend:
    vocab = {piece: n for n, piece in enumerate([*names.values(), *LETTERS, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Backend(
        models.BPE(vocab, [("a", "b"), ("h", "i"), ("▁", "a"), ("▁", "hi")], unk_token=names["unk"], byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return backend


def legacy_llama(names: dict[str, str]) -> Backend:
    backend = metaspace_bpe(names, "never")
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def byte_level(names: dict[str, str], prefix_space: bool) -> Backend:
    pieces = [*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "hi", "Ġa", "Ġhi", "<|", "|>"]
    merges = [("a", "b"), ("h", "i"), ("Ġ", "a"), ("Ġ", "hi"), ("<", "|"), ("|", ">")]
    backend = Backend(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def llama_3(names: dict[str, str]) -> Backend:
    """With Qwen's normalizer; what a regular expression makes of a text depends on what is beside each piece."""
    backend = byte_level(names, False)
    backend.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def gemma(names: dict[str, str]) -> Backend:
    backend = metaspace_bpe(names, "never")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return backend


def clip(names: dict[str, str]) -> Backend:
    pieces = dict.fromkeys([*names.values(), *LETTERS, *(f"{letter}</w>" for letter in LETTERS)])
    vocab = {piece: n for n, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [("a", "b")], end_of_word_suffix="</w>", unk_token=names["unk"]))
    spaces = Regex(r"\s+")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(spaces, " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(spaces, "removed"), pre_tokenizers.Punctuation()])
    return backend


def by_scripts(names: dict[str, str]) -> Backend:
    backend = metaspace_bpe(names, "first")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), metaspace])
    return backend


def by_delimiter(names: dict[str, str]) -> Backend:
    backend = word_level(names)
    backend.normalizer = normalizers.StripAccents()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.CharDelimiterSplit("|")])
    return backend


def word_piece(names: dict[str, str]) -> Backend:
    pieces = [*names.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = Backend(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token=names["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def word_level(names: dict[str, str]) -> Backend:
    pieces = [*names.values(), *LETTERS]
    backend = Backend(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token=names["unk"]))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


KINDS: dict[str, Callable[[dict[str, str]], Backend]] = {
    **{f"unigram {scheme}": lambda names, scheme=scheme: unigram(names, scheme) for scheme in ("first", "always", "never")},
    **{f"BPE {scheme}": lambda names, scheme=scheme: metaspace_bpe(names, scheme) for scheme in ("first", "always", "never")},
    "legacy llama": legacy_llama,
    "byte-level": lambda names: byte_level(names, False),
    "byte-level, prefix space": lambda names: byte_level(names, True),
    "word pieces": word_piece,
    "word level": word_level,
    "Llama 3": llama_3,
    "Gemma": gemma,
    "CLIP": clip,
    "scripts": by_scripts,
    "delimiters": by_delimiter,
}
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {"normalized": False},
    "strip left": {"lstrip": True, "normalized": False},
    "strip right": {"rstrip": True, "normalized": False},
    "single word": {"single_word": True, "normalized": False},
    "normalized": {"normalized": True},
    "all": {"lstrip": True, "rstrip": True, "single_word": True, "normalized": True},
}
CHAT = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content | trim }}{{ eos_token }}{% endfor %}<|a|>"


@cache
def tokenizer(kind: str, flags: str, twin: bool = False) -> Tokenizer:
    names = TWIN if twin else OWN
    backend = KINDS[kind](names)
    backend.add_special_tokens([AddedToken(name, special=True, **FLAGS[flags]) for name in names.values()])
    backend.add_tokens([AddedToken(each, normalized=FLAGS[flags]["normalized"]) for each in ("<t>", "hi x")])
    begin = backend.token_to_id(names["s"])
    backend.post_processor = processors.TemplateProcessing(single=f"{names['s']} $A", special_tokens=[(names["s"], begin)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names["s"], eos_token=names["b"])
    fast.chat_template = CHAT
    return Tokenizer(fast, kind)


@dataclass(frozen=True)
class Part:
    """A part of a template, and what it writes for the row's text: texts, and names of special tokens."""

    source: str
    writes: Callable[[str], Sequence[tuple[str, str]]]


def text(value: str) -> Sequence[tuple[str, str]]:
    return [("", value)]


PARTS = [
    *(Part(literal, lambda q, literal=literal: text(literal)) for literal in ("Q: ", " ", "\n", "hi ", " x")),
    *(Part(OWN[name], lambda q, name=name: [(name, "")]) for name in ("a", "b", "s", "user")),
    Part("{{ q }}", text),
    Part("{{ q ~ q }}", lambda q: text(q + q)),
    Part("{{ q[1:6] }}", lambda q: text(q[1:6])),
    Part("{{ q | upper }}", lambda q: text(q.upper())),
    Part("{{ q | lower }}", lambda q: text(q.lower())),
    Part("{{ q | length }}", lambda q: text(str(len(q)))),
    Part("{{ q | trim }}", lambda q: text(q.strip())),
    Part("{{ q | replace('<|a|>', 'hi') }}", lambda q: text(q.replace("<|a|>", "hi"))),
    Part("{{ q | replace('hi', '') }}", lambda q: text(q.replace("hi", ""))),
    Part("{{ q | replace('é', '<|b|>') }}", lambda q: insert(q, "é", "b")),
    Part("{{ d.q }}{{ d['n'] }}", lambda q: text(q + "1")),
    Part("{{ d | tojson }}", lambda q: text('{"q": ' + quoted(q) + ', "n": 1}')),
    Part("{{ xs | join('<s>') }}", lambda q: [("", q), ("s", ""), ("", q)]),
    Part("{% if '<|a|>' in q %}hi{% else %}none of them{% endif %}", lambda q: text("hi" if "<|a|>" in q else "none of them")),
    Part("{% if q == '<s>' %}same{% endif %}", lambda q: text("same" if q == "<s>" else "")),
    Part("{{ '<|b|>' ~ q ~ '<s>' }}", lambda q: [("b", ""), ("", q), ("s", "")]),
    Part("{% set x %}<|a|>{{ q }}{% endset %}{{ x | trim }}", lambda q: [("a", ""), ("", q.rstrip())]),
    Part("{% macro m(x) %}{{ x }}<|b|>{% endmacro %}{{ m(q) }}", lambda q: [("", q), ("b", "")]),
    Part("{% for w in q.split('<s>') %}[{{ w }}]{% endfor %}", lambda q: text("".join(f"[{w}]" for w in q.split("<s>")))),
]
PIECES = [
    "<|a|>",
    "<|b|>",
    "<s>",
    "<|user|>",
    "<|A|>",
    "<t>",
    "<|",
    "|>",
    "a|",
    "hi",
    "ab",
    " ",
    "  ",
    "\n",
    "é",
    "x",
    "</s>",
    "<unk>",
    BLANK,
]
QUESTIONS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


def insert(q: str, where: str, name: str) -> Sequence[tuple[str, str]]:
    parts = [("", part) for part in q.split(where)]
    return [each for part in parts for each in (part, (name, ""))][:-1]


def quoted(q: str) -> str:
    return '"' + q.replace("\n", "\\n") + '"'


def twin_text(written: Sequence[tuple[str, str]], single_word: bool) -> str:
    """The text for the twin. A token that must be a word of its own is none beside a letter, wherever it comes from."""
    shown = [OWN.get(name, value) for name, value in written]
    twin: list[str] = []
    for at, (name, _) in enumerate(written):
        before, after = "".join(shown[:at]), "".join(shown[at + 1 :])
        attached = single_word and bool(re.search(r"\w\Z", before) or re.match(r"\w", after))
        twin.append(TWIN[name] if name and not attached else shown[at])
    return "".join(twin)


def ids_of(kind: str, flags: str, prompt: dict[str, Any], row: dict[str, Any]) -> list[int] | RowError:
    used = tokenizer(kind, flags)
    job = Job.load({"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}, "prompt": prompt})
    builder = PromptBuilder(job.prompt, job.generation, used, Limits(4096, used.vocab_size))
    built = builder.build([Row(0, row)])[0]
    return built if isinstance(built, RowError) else built.token_ids.tolist()


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(FLAGS)),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5),
    QUESTIONS,
)
def test_tokens_are_the_tokenizer_s_own(kind: str, flags: str, parts: list[Part], q: str) -> None:
    row = {"q": q, "d": {"q": q, "n": 1}, "xs": [q, q]}
    written = [each for part in parts for each in part.writes(q)]
    # A unigram model finds its own pieces everywhere.
    twin = twin_text(written, FLAGS[flags].get("single_word", False) and "unigram" not in kind)
    # Where the normalizer puts a letter in front of everything, normalised tokens are found at the beginning alone.
    assume(twin.strip() and not (kind == "legacy llama" and FLAGS[flags]["normalized"]))
    expected = tokenizer(kind, flags, twin=True).encode_batch([twin], True)[0]
    prompt = {"template": "".join(part.source for part in parts), "chat": False}
    assert ids_of(kind, flags, prompt, row) == expected, twin


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.lists(QUESTIONS, min_size=1, max_size=3))
def test_so_they_are_behind_the_model_s_chat_template(kind: str, contents: list[str]) -> None:
    assume(contents[-1].strip())
    messages = [{"role": "user", "content": content} for content in contents]
    twin = "".join(TWIN["user"] + content.strip() + TWIN["b"] for content in contents) + TWIN["a"]
    expected = tokenizer(kind, "plain", twin=True).encode_batch([twin], False)[0]
    assert ids_of(kind, "plain", {"messages": "m"}, {"m": messages}) == expected


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_row_yields_a_special_id(kind: str) -> None:
    special = tokenizer(kind, "plain").encode_batch([OWN[name] for name in ("a", "b", "s", "user")], False)
    ids = ids_of(kind, "plain", {"template": "{{ q }}", "chat": False}, {"q": "hi <s> <|a|> <|b|><|user|> x"})
    assert isinstance(ids, list) and not {each[-1] for each in special} & set(ids[1:])


def test_only_a_text_that_can_spell_one_is_looked_at_twice() -> None:
    special = Blanking(["<|a|>", "<|user|>", "<s>", "[INST]"])
    assert [
        special.may_occur(each) for each in ("if a(b): {c} | < d", "a > b", {"k": ["x[]"]}, {">": 1}, 3, None, "&#60;")
    ] == [*(False, True, True, True, False, False, True)]
    assert not Blanking([]).may_occur("<s>") and Blanking(["end"]).may_occur("")
    assert Blanking(["<|a|>"], normalized=True).may_occur("\uff5c")


def test_examples_are_rows_too(tmp_path: Any, write_rows: Any) -> None:
    shots = write_rows({"q": "one <|a|>"}, {"q": "two"}, name="shots.jsonl")
    few_shot = {"path": str(shots), "k": 2, "template": "<s>{{ q }}<|b|>"}
    ids = ids_of("byte-level", "plain", {"template": "{{ q }}", "chat": False, "few_shot": few_shot}, {"q": "hi <|user|>"})
    twin = "{ß3ß}one <|a|>{ß2ß}\n\n{ß3ß}two{ß2ß}\n\nhi <|user|>"
    assert ids == tokenizer("byte-level", "plain", twin=True).encode_batch([twin], True)[0]
