"""The model's tokenizer: texts to ids and back, in batches on every core.

Adds a BOS where the tokenizer would and the text has none, and never an end token after a prompt. Renders the model's own chat
template; rows and other templates are handled in `input/prompts`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any, cast

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tokabatch.arrays import Int32
from tokabatch.errors import RowError
from tokabatch.input.prompts.blanking import Blank, as_written
from tokabatch.input.tokenizer.byte_pieces import Decode, byte_level_decoding
from tokabatch.input.tokenizer.special_token_spelling import Occurrence, SpecialTokens

PROBE = "a"
DECODE_CHUNK = 4096
SLICE_CHARACTERS = 256 << 10
LONG_TEXT_CHARACTERS = 1 << 20
LISTED = 5
_ADDRESS = re.compile(r"<[^<>]{1,200} at 0x[0-9a-f]{6,}>")
"""The Python representation of a method, a function or a generator."""


class Tokenizer:
    """Immutable in use, and safe to share between threads that only encode and decode."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str, replaced: tuple[str, ...] = ()) -> None:
        self.name = name
        self.replaced = replaced
        """Parts of tokenizer.json that transformers' AutoTokenizer would replace by its own."""
        self._tokenizer = tokenizer
        self._backend: Backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._decode: Decode | None = None
        self._added = self._backend.get_added_tokens_decoder()
        self.special_by_id: Mapping[int, str] = {n: str(token.content) for n, token in self._added.items() if token.special}
        """The texts of the special tokens, by id."""
        plain = self._encode([PROBE])[0]
        whole: list[int] = self._backend.encode(PROBE, add_special_tokens=True).ids
        begin = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        self._prefix = tuple(whole[:begin])
        self._prefix_text = str(self._backend.decode(list(self._prefix), skip_special_tokens=False)) if self._prefix else ""

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The sources of the chat templates by name; an only template is called `default`."""
        held = cast("str | dict[str, str] | None", self._tokenizer.chat_template)
        return {} if held is None else {"default": held} if isinstance(held, str) else held

    @property
    def eos_id(self) -> int | None:
        return cast("int | None", self._tokenizer.eos_token_id)

    @property
    def named_special_tokens(self) -> dict[str, str | None]:
        """The texts of the bos, eos, pad and unk tokens, by role."""
        named = cast("dict[str, Any]", self._tokenizer.special_tokens_map)
        return {f"{role}_token": named.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")}

    @property
    def prefix_text(self) -> str:
        """The text of what `add_special_tokens` puts in front: the BOS, or nothing."""
        return self._prefix_text

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def own_vocab_size(self) -> int:
        """One more than the largest token id of the vocabulary without added tokens."""
        return max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def token_text(self, token: int) -> str:
        """Return the vocabulary's spelling of a token; empty for an unused id."""
        return self._backend.id_to_token(token) or ""

    def describe(self, num_embeddings: int) -> tuple[str, ...]:
        """Return notes on what may surprise a user of this tokenizer with a model of `num_embeddings` embeddings."""
        sentences: list[str] = []
        if self.replaced:
            sentences.append(
                f"warning: the tokenizer of {self.name!r} is used as its tokenizer.json says; transformers' AutoTokenizer "
                f"would put its own {' and '.join(self.replaced)} in place of the file's"
            )
        beyond = {token: str(each.content) for token, each in sorted(self._added.items()) if token >= num_embeddings}
        if beyond:
            listed = ", ".join(f"{token} {text!r}" for token, text in list(beyond.items())[:LISTED])
            more = f" and {len(beyond) - LISTED} more" if len(beyond) > LISTED else ""
            sentences.append(
                f"warning: the tokenizer's added tokens {listed}{more} have no embedding in the model, which has "
                f"{num_embeddings}; a prompt that uses one is an error row"
            )
        return tuple(sentences)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """The texts that the tokenizer reads as special tokens."""
        return frozenset(self.special_by_id.values())

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Finds and quotes special tokens in texts."""
        return SpecialTokens(self._backend, self._added)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text, with a BOS in front if `add_special_tokens`, unless the text begins with its
        own."""
        return [self._with_prefix(ids, add_special_tokens) for ids in self._encode(texts)]

    def encode_quoted(self, batch: Sequence[tuple[str, Sequence[Occurrence]]], add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of texts in which only the given occurrences are special tokens; other spellings are plain text."""
        return [self._with_prefix(ids, add_special_tokens) for ids in self.special_tokens.encode_quoted(batch)]

    def exceeds(self, text: str, limit: int) -> bool:
        """Return whether a very long text certainly has more than `limit` tokens, counted slice by slice in little memory. A
        slice's count can differ from its share of the whole only at its two ends, so twice the limit is a safe margin."""
        if len(text) <= LONG_TEXT_CHARACTERS:
            return False
        count = 0
        for start in range(0, len(text), SLICE_CHARACTERS):
            count += len(self._encode([text[start : start + SLICE_CHARACTERS]])[0])
            if count > 2 * limit:
                return True
        return False

    def decode_batch(self, batch: Sequence[Sequence[int] | Int32], skip_special_tokens: bool = True) -> list[str]:
        """Return the text of each list of ids; bytes that are not UTF-8 become U+FFFD."""
        if self._decode is not None:
            with suppress(IndexError):
                return self._decode(batch, skip_special_tokens)
        lists = [ids.tolist() if isinstance(ids, np.ndarray) else list(ids) for ids in batch]
        return self._backend.decode_batch(lists, skip_special_tokens=skip_special_tokens)

    def get_ready_to_decode(self) -> None:
        """Make later calls of `decode_batch` fast for many samples; takes a tenth of a second for a vocabulary of 128,000."""
        self._decode = self._decode or byte_level_decoding(self._backend)

    def piece_texts(self) -> list[str]:
        """Return what each id adds to a decoded text, by id: U+FFFD for a part of a character, empty for a special token and an
        unused id.

        Ids are decoded after a letter, since a first token may lose its leading space.
        """
        before = self._encode([PROBE])[0][-1:]
        start = len(self.decode_batch([before])[0])
        texts: list[str] = []
        for first in range(0, self.vocab_size, DECODE_CHUNK):
            batch = [[*before, token] for token in range(first, min(first + DECODE_CHUNK, self.vocab_size))]
            texts.extend(text[start:] for text in self.decode_batch(batch))
        return texts

    def special_ids(self) -> dict[str, int]:
        """Return the ids of special tokens by their text: a stop string that spells one means the token."""
        texts = sorted(self.special_texts)
        return {text: ids[0] for text, ids in zip(texts, self.encode_batch(texts, False), strict=True) if len(ids) == 1}

    def lone_bytes(self) -> frozenset[int]:
        """Return the ids that represent one byte (`<0x41>`), which are decoded together with the bytes beside them."""
        ids = {f"<0x{byte:02X}>": self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        found = {text: token for text, token in ids.items() if token is not None}
        decoded = self.decode_batch([[token] for token in found.values()], skip_special_tokens=False)
        return frozenset(token for (text, token), shown in zip(found.items(), decoded, strict=True) if shown != text)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        template: str,
        variables: Mapping[str, Any],
        now: datetime,
        blank: Blank = as_written,
    ) -> str | RowError:
        """Render the conversation for the model, up to where its answer begins; one that ends with an assistant message is
        continued in that message. `variables` are the template's own, tools and documents among them; `now` is the time that it
        sees. Returns an error `bad_messages` if the template refuses the conversation. The template, and the special texts
        passed to it by name, pass through `blank`."""
        resumed = messages[-1].get("role") == "assistant"
        names = cast("dict[str, Any]", self._tokenizer.special_tokens_map).items() if blank is not as_written else ()
        blanked: dict[str, Any] = {name: blank(text) for name, text in names if isinstance(text, str)}
        source = blank(template)
        try:
            # transformers offers no other way to set the clock: it caches each compiled template with its own `strftime_now`.
            compiled = chat_template_utils._compile_jinja_template(source)  # pyright: ignore[reportPrivateUsage]
            compiled.globals["strftime_now"] = now.strftime
            text = cast(
                "str",
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=not resumed,
                    continue_final_message=resumed,
                    **(blanked | dict(variables)),
                ),
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            if "continue_final_message" in str(error):
                return RowError(
                    "bad_messages",
                    "the chat template changes the text of the last message, which is the assistant's, so that it cannot be "
                    "continued; end the conversation with a user's message",
                )
            return RowError("bad_messages", f"the model's chat template refuses the messages: {error}")
        except (RecursionError, MemoryError) as error:
            return RowError("template_too_large", f"the model's chat template was stopped: {error}")
        given = (messages, variables)
        shown = next((each for each in _ADDRESS.findall(text) if not _holds(given, each)), None)
        if shown is None:
            return text
        return RowError(
            "bad_messages",
            f"the chat template prints {shown}, Python's representation of an object, which differs at each start; a field "
            "that has the name of a method is read as value['items'] (name a corrected template as prompt.chat_template)",
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _with_prefix(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        prefix = list(self._prefix) if add_special_tokens else []
        return ids if ids[: len(prefix)] == prefix else prefix + ids


def _holds(value: Any, text: str) -> bool:
    """Return whether a text in `value`, at any depth, contains this one."""
    if isinstance(value, str):
        return text in value
    if isinstance(value, Mapping):
        value = [*cast("Mapping[Any, Any]", value).keys(), *cast("Mapping[Any, Any]", value).values()]
    return isinstance(value, list | tuple) and any(_holds(each, text) for each in cast("list[Any]", value))
