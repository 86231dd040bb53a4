"""The sampling parameters of each row: its column `sampling_params` over the job's `generation`, with `bad_words` as token ids;
settings that name tokens outside the model's vocabulary are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tokabatch.errors import JobError, RowError
from tokabatch.input.kinds import kind_of
from tokabatch.input.prompts.chat import decoded
from tokabatch.input.prompts.sources import SAMPLING_PARAMS
from tokabatch.input.tokenizer.stop_texts import refuse_special
from tokabatch.job import GenerationConfig
from tokabatch.number_text import counted
from tokabatch.scheduling.contracts import SamplingParams

if TYPE_CHECKING:
    from tokabatch.input.tokenizer.tokenizer import Tokenizer

MAX_KNOWN = 1024
"""Number of different settings of rows that are cached."""
NAMING_TOKENS = frozenset(("logprobs", "stop", "stop_token_ids", "logit_bias", "bad_words"))
"""Settings that only the model can validate; the job's own are checked before."""


class RowSettings:
    """Makes sampling parameters of rows, for a model of `vocab_size` tokens."""

    def __init__(self, generation: GenerationConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._known: dict[str, SamplingParams | RowError] = {}
        self._bad_words: dict[str, list[list[int]]] = {}
        """The token ids of each text."""
        given = {name: getattr(generation, name) for name in generation.model_fields_set}
        self._generation = GenerationConfig.model_validate(given | {"bad_words": self._encode_words(generation.bad_words)})
        self.of_job = self._generation.params()
        """Parameters of rows without settings of their own."""

    def of(self, row: Mapping[str, Any]) -> SamplingParams | RowError:
        """Return the parameters of a row with these columns, or an error `bad_sampling`."""
        given = row.get(SAMPLING_PARAMS)
        if given is None:
            return self.of_job
        # Most rows share a few settings. The text distinguishes `true` from 1, which compare equal although one of them is
        # refused.
        written = repr(given)
        params = self._known.get(written)
        if params is None:
            params = self._check(given)
            if len(self._known) < MAX_KNOWN:
                self._known[written] = params
        return params

    def _check(self, given: Any) -> SamplingParams | RowError:
        """Return the parameters for these settings, an object or its JSON text."""
        given = decoded(given)
        if not isinstance(given, Mapping):
            return RowError("bad_sampling", f"{SAMPLING_PARAMS} must be an object of settings, not {kind_of(given)}")
        settings = cast("Mapping[str, Any]", given)
        if settings.get("bad_words") is not None:
            settings = {**settings, "bad_words": self._encode_words(settings["bad_words"])}
        params = self._generation.row_params(settings)
        if isinstance(params, SamplingParams) and not NAMING_TOKENS.isdisjoint(settings):
            if fault := refuse_beyond(params, self._vocab_size):
                return RowError("bad_sampling", f"{SAMPLING_PARAMS}.{fault}")
            if fault := refuse_special(params.stop, self._tokenizer.special_texts):
                return RowError("bad_sampling", f"{SAMPLING_PARAMS}.{fault}")
        return params

    def _encode_words(self, words: Any) -> Any:
        """Return `bad_words` with token ids in place of texts. A text is banned as it is and after a space, where that is a
        different token and not one more, as in vLLM. Anything that is not text is left for the validation to refuse."""
        if isinstance(words, str):
            words = [words]
        if not isinstance(words, list | tuple):
            return words
        encoded: list[Any] = []
        for word in cast("Sequence[Any]", words):
            if not isinstance(word, str) or not word:
                encoded.append(word)
                continue
            if word not in self._bad_words:
                begins = word.lstrip(" ") or word
                alone, behind = self._tokenizer.encode_batch([begins, " " + begins], False)
                other = behind[:1] != alone[:1] and len(behind) == len(alone)
                self._bad_words[word] = [list(ids) for ids in ([alone, behind] if other else [alone])]
            encoded += self._bad_words[word]
        return encoded


def refuse_beyond(params: SamplingParams, vocab_size: int) -> str | None:
    """Return why a model of `vocab_size` tokens cannot be sampled with `params`, None if it can: a setting names a token that
    it does not have."""
    if (params.logprobs or 0) > vocab_size:
        return f"logprobs is {params.logprobs}, but the model has {counted(vocab_size, 'token')}; write at most that many"
    named: dict[str, Iterable[int]] = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": (token for token, _ in params.logit_bias),
        "bad_words": (token for word in params.bad_words for token in word),
    }
    for name, tokens in named.items():
        if (largest := max(tokens, default=-1)) >= vocab_size:
            return f"{name} names {largest}, but the model's token ids end at {vocab_size - 1}"
    return None


def refuse_beyond_context(generation: GenerationConfig, context_length: int) -> None:
    """Raises the JobError of a job whose samples would have no room for a prompt in a context of so many tokens."""
    if generation.max_tokens != "context" and generation.max_tokens >= context_length:
        raise JobError(
            f"generation.max_tokens is {generation.max_tokens}, but the model's context is {counted(context_length, 'token')}, "
            "prompt included; write `max_tokens: context`, which is what each prompt leaves of it, or a number that leaves "
            "room for the longest prompt"
        )
