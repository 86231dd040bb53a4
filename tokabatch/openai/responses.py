"""Finished samples as the response objects of OpenAI's API: choices in order, log-probabilities in both forms, usage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokabatch.arrays import Float32, Int32
from tokabatch.openai.requests import CHAT, Request
from tokabatch.scheduling.contracts import Completion

LEAST_LOGPROB = -9999.0
"""In place of the logarithm of a probability of 0, for which JSON has no number."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Spell = Callable[[int], str]
"""The text of a token id; U+FFFD where it is part of a character."""


class Reported(Protocol):
    """What is reported for each of a sample's T tokens, if requested: shapes [T], [T, K] and [T, K]."""

    @property
    def logprobs(self) -> Float32 | None: ...
    @property
    def top_ids(self) -> Int32 | None: ...
    @property
    def top_logprobs(self) -> Float32 | None: ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, each with the logarithm of its probability, and the most likely tokens in its place, the first one first. A
    prompt's first token has neither: None and no alternatives."""

    ids: Sequence[int]
    logprobs: Sequence[float | None] = ()
    top: Sequence[Sequence[tuple[int, float]]] = ()

    @classmethod
    def of(cls, ids: Int32, reported: Reported) -> Tokens:
        """Those that a sample has drawn, with what is reported of them."""
        logprobs: Sequence[float] = () if reported.logprobs is None else reported.logprobs.tolist()
        top: list[list[tuple[int, float]]] = []
        if reported.top_ids is not None and reported.top_logprobs is not None:
            pairs = zip(reported.top_ids.tolist(), reported.top_logprobs.tolist(), strict=True)
            top = [list(zip(ids, values, strict=True)) for ids, values in pairs]
        return cls(ids.tolist(), logprobs, top)

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """One behind the other."""
        ids = [each for part in parts for each in part.ids]
        logprobs = [each for part in parts for each in part.logprobs]
        return cls(ids, logprobs, [each for part in parts for each in part.top])

    def behind(self, count: int) -> Tokens:
        """Without the first `count`."""
        return Tokens(self.ids[count:], self.logprobs[count:], self.top[count:])


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sample. `tokens` are all that were sampled, including those of the stop; `logprobs` and `top` are empty if
    none were requested."""

    text: str
    tokens: Tokens
    finish_reason: str

    @classmethod
    def of(cls, completion: Completion, text: str) -> Sample:
        """The sample of a completion that is no error, decoded as `text`."""
        return cls(text, Tokens.of(completion.token_ids, completion), completion.finish_reason)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that the answer begins with; `tokens.logprobs` is empty if none were requested."""

    text: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """The samples of one prompt, in the order of their numbers."""

    samples: Sequence[Sample]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    echo: Echo | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The identity of a response. `number` makes its id, `created` is in seconds since 1970; `model` is the name in the
    answer."""

    number: str
    created: int
    model: str
    system_fingerprint: str | None = None

    def fields(self, request: Request, chunk: bool = False) -> dict[str, Any]:
        """The fields in front of the choices; `chunk`: of a part of a stream."""
        chat = request.url == CHAT
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def build_response(request: Request, answers: Sequence[Answer], head: Head, spell: Spell) -> dict[str, Any]:
    """The response to `request`, whose prompts have these answers in their order; those to a chat request are one."""
    samples = [(answer, sample) for answer in answers for sample in answer.samples]
    make = _chat_choice if request.url == CHAT else _text_choice
    wanted = request.logprobs is not None
    choices = [make(index, answer, sample, spell, wanted) for index, (answer, sample) in enumerate(samples)]
    return {**head.fields(request), "choices": choices, "usage": usage(answers)}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts; those of a prompt count once, however many samples it has."""
    prompt = sum(answer.num_prompt_tokens for answer in answers)
    drawn = sum(len(sample.tokens.ids) for answer in answers for sample in answer.samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(answer.num_cached_tokens for answer in answers)},
    }


def finish_reason(reason: str) -> str:
    """A sample's reason to end as the API calls it."""
    return "stop" if reason == "stop" else "length"


def chat_logprobs(tokens: Tokens, spell: Spell) -> dict[str, Any]:
    """The object `logprobs` of a chat choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = spell(token)
        # A token that is part of a character has bytes that its text does not show.
        return {"token": text, "logprob": _json(logprob), "bytes": None if REPLACEMENT in text else list(text.encode())}

    tops = tokens.top or [()] * len(tokens.ids)
    content = [
        {**entry(token, logprob), "top_logprobs": [entry(*each) for each in top]}
        for token, logprob, top in zip(tokens.ids, tokens.logprobs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Tokens, spell: Spell, offset: int = 0) -> dict[str, Any]:
    """Return the object `logprobs` of a completions choice. If alternatives are requested, those of a token include the token
    itself, and a prompt's first token has null; two tokens of one text are one entry, with the more likely one's value.
    `offset` is where the first token begins in the choice's text."""
    texts, offsets = [spell(token) for token in tokens.ids], list[int]()
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top: list[dict[str, float | None] | None] = []
    for place, (text, logprob) in enumerate(zip(texts, tokens.logprobs, strict=True)):
        likely: dict[str, float | None] = {}
        for token, value in tokens.top[place] if tokens.top else ():
            likely.setdefault(spell(token), _json(value))
        likely.setdefault(text, _json(logprob))
        top.append(None if logprob is None else likely)
    return {
        "tokens": texts,
        "token_logprobs": [_json(logprob) for logprob in tokens.logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def chunks(request: Request, response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a whole response into the parts of a stream: for each choice its text, then its end; then the usage, if
    requested."""
    chat = request.url == CHAT
    head = {name: value for name, value in response.items() if name not in ("choices", "usage")}
    if chat:
        head["object"] = "chat.completion.chunk"
    extra = {"usage": None} if request.include_usage else {}
    for choice in response["choices"]:
        part = {name: value for name, value in choice.items() if name not in ("message", "finish_reason")}
        if chat:
            part["delta"] = choice["message"]
        yield {**head, "choices": [{**part, "finish_reason": None}], **extra}
        end = {"delta": {}} if chat else {"text": ""}
        last = {"index": choice["index"], **end, "logprobs": None, "finish_reason": choice["finish_reason"]}
        yield {**head, "choices": [last], **extra}
    if request.include_usage:
        yield {**head, "choices": [], "usage": response["usage"]}


def _chat_choice(index: int, answer: Answer, sample: Sample, spell: Spell, wanted: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": sample.text, "refusal": None},
        "logprobs": chat_logprobs(sample.tokens, spell) if wanted else None,
        "finish_reason": finish_reason(sample.finish_reason),
    }


def _text_choice(index: int, answer: Answer, sample: Sample, spell: Spell, wanted: bool) -> dict[str, Any]:
    echo, text, tokens = answer.echo, sample.text, sample.tokens
    if echo is not None:
        text = echo.text + text
        tokens = Tokens(
            [*echo.tokens.ids, *tokens.ids],
            [*echo.tokens.logprobs, *tokens.logprobs],
            [*echo.tokens.top, *tokens.top],
        )
    return {
        "index": index,
        "text": text,
        "logprobs": text_logprobs(tokens, spell) if wanted else None,
        "finish_reason": finish_reason(sample.finish_reason),
    }


def _json(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
