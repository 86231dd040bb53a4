"""From a request of the API to its answer: prompts are built and drawn, and what comes of them is put together.

A prompt whose tokens are to have log-probabilities (`echo` with `logprobs`) is a given text behind its first token. Where one
more token is drawn behind it, greedily or not, that is the same sample; for anything else the prompt comes twice, once to be
scored and once to be continued.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokabatch.errors import RowError, TokabatchError
from tokabatch.input.prompts.builder import Prompt
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.number_text import counted
from tokabatch.openai.errors import ApiError, of_row
from tokabatch.openai.requests import CHAT, Request
from tokabatch.openai.responses import (
    Answer,
    Echo,
    Head,
    Sample,
    Tokens,
    build_response,
    chat_logprobs,
    chunks,
    finish_reason,
    text_logprobs,
    usage,
)
from tokabatch.scheduling.contracts import Completion, SamplingParams
from tokabatch.serve.dispatch import Wanted, beyond_limits
from tokabatch.serve.engine import Engine, Finished, News
from tokabatch.serve.prompts import Prompts
from tokabatch.serve.text_stream import TextStream


class Refused(Exception):
    """A request that has no answer; `retry_after` is in seconds."""

    def __init__(self, error: ApiError, retry_after: int | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class _Draft:
    """A prompt of a request: what is sampled after it, and what scores it, each if requested; or `both`, a single sample that
    does both."""

    prompt: Prompt
    drawn: Wanted | None = None
    scored: Wanted | None = None
    both: Wanted | None = None

    @property
    def wanted(self) -> list[Wanted]:
        return [each for each in (self.drawn, self.scored, self.both) if each is not None]


class Completions:
    """Answers the requests of one server."""

    def __init__(self, engine: Engine, prompts: Prompts, tokenizer: Tokenizer, ends: Sequence[int], most_tokens: int) -> None:
        """`most_tokens` limits the tokens of one request; `ends` are the model's end tokens."""
        self._engine = engine
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._most_tokens = most_tokens
        pieces = tokenizer.piece_texts()
        self._pieces = [piece or tokenizer.special_by_id.get(token, "") for token, piece in enumerate(pieces)]

    def spell(self, token: int) -> str:
        """The text of a token; U+FFFD where it is part of a character."""
        return self._pieces[token] if token < len(self._pieces) else ""

    async def prepare(self, request: Request) -> list[_Draft]:
        """What the engine is to do. Raises Refused."""
        none_drawn = request.settings.get("max_tokens") == 0
        if none_drawn:
            request = replace(request, settings={**request.settings, "max_tokens": 1})
        try:
            built = await self._prompts.build(request.rows())
        except TokabatchError as error:
            raise Refused(ApiError(str(error), code="engine_error", status=500)) from error
        if error := next((each for each in built if isinstance(each, RowError)), None):
            raise Refused(of_row(error, request.prompt_field))
        drafts: list[_Draft] = []
        for place, prompt in enumerate(each for each in built if isinstance(each, Prompt)):
            drafts.append(_draft(prompt, place if "seed" in request.settings else None, request, none_drawn))
        tokens = sum(wanted.params.n * wanted.params.max_tokens for draft in drafts for wanted in draft.wanted)
        if tokens > self._most_tokens:
            raise Refused(
                ApiError(
                    f"the request asks for up to {counted(tokens, 'token')} (prompts times n times max_tokens); one may ask "
                    f"for {self._most_tokens:,}. Lower max_tokens, send several requests, or raise server.max_request_tokens",
                    "max_tokens",
                    "too_many_tokens",
                )
            )
        for draft in drafts:
            if draft.drawn is not None and (excess := beyond_limits(draft.drawn.params)) is not None:
                raise Refused(ApiError(f"{excess[0]} may hold {excess[1]} in a request", excess[0], "invalid_value"))
        samples = sum(wanted.params.n for draft in drafts for wanted in draft.wanted)
        if samples > (most := self._engine.most_samples):
            message = (
                f"the request asks for {counted(samples, 'sample')} (prompts times n), but at most {most:,} run and wait at a "
                "time. "
            )
            advice = "Send several requests, or raise server.max_waiting"
            raise Refused(ApiError(message + advice, "n", "too_many_samples"))
        if not self._engine.has_room(samples):
            raise Refused(ApiError("too many samples wait; send the request again later", code="overloaded", status=503), 1)
        return drafts

    async def answer(self, request: Request, head: Head) -> dict[str, Any]:
        """The response object. Raises Refused; what is not finished is cancelled with the task."""
        drafts = await self.prepare(request)
        with self._engine.work([wanted for draft in drafts for wanted in draft.wanted]) as future:
            try:
                finished = iter(await future)
            except TokabatchError as error:
                raise Refused(ApiError(str(error), code="engine_error", status=503), 5) from error
        answers: list[Answer] = []
        for place, draft in enumerate(drafts):
            answers.append(self._answer(request, place, draft, [next(finished) for _ in draft.wanted]))
        return build_response(request, answers, head, self.spell)

    async def stream(self, request: Request, drafts: list[_Draft], head: Head) -> AsyncGenerator[dict[str, Any]]:
        """The parts of the response as they come; the last one is an error object where it cannot be finished."""
        events: asyncio.Queue[tuple[int, int, News | Finished] | None] = asyncio.Queue()
        wanted = [each for draft in drafts for each in draft.wanted]
        streams: dict[tuple[int, int], _Choice] = {}
        common, extra = head.fields(request, chunk=True), {"usage": None} if request.include_usage else {}
        with self._engine.work(wanted, lambda *event: events.put_nowait(event)) as future:
            future.add_done_callback(lambda _: events.put_nowait(None))
            while (event := await events.get()) is not None:
                place, number, output = event
                choice = streams.get((place, number))
                if choice is None:
                    text = TextStream(self._tokenizer.decode_batch, drafts[place].prompt.params.stop)
                    index = place * drafts[place].prompt.params.n + number
                    choice = streams[place, number] = _Choice(request, index, text, self.spell)
                if isinstance(output, Finished) and output.completion.error_code is not None:
                    yield _failure(output.completion).body()
                    return
                for part in choice.parts(output):
                    yield {**common, "choices": [part], **extra}
            if future.cancelled() or future.exception() is not None:
                reason = "the server has ended" if future.cancelled() else str(future.exception())
                yield ApiError(reason, code="engine_error", status=503).body()
                return
            finished = future.result()
        if request.include_usage:
            pairs = enumerate(zip(drafts, finished, strict=True))
            answers = [self._answer(request, place, draft, [each]) for place, (draft, each) in pairs]
            yield {**common, "choices": [], "usage": usage(answers)}

    async def stream_whole(self, request: Request, head: Head) -> AsyncGenerator[dict[str, Any]]:
        """The same for an answer that is there all at once."""
        for part in chunks(request, await self.answer(request, head)):
            yield part

    def _answer(self, request: Request, place: int, draft: _Draft, finished: list[list[Finished]]) -> Answer:
        """Put together what was drawn and what was scored. Raises Refused where a sample failed."""
        for each in (sample for samples in finished for sample in samples):
            if each.completion.error_code is not None:
                raise Refused(_failure(each.completion))
        ids = draft.prompt.token_ids.tolist()
        samples = [Sample.of(each.completion, each.text) for each in finished[0]] if draft.drawn is not None else []
        echo = None
        if request.echo:
            given = request.prompts[place] if request.prompts else ""
            text = given if isinstance(given, str) else self._tokenizer.decode_batch([ids], skip_special_tokens=False)[0]
            tokens = Tokens(ids, [None] if request.logprobs is not None else (), [()] if request.logprobs else ())
            if draft.scored is not None or draft.both is not None:
                scored = Sample.of(finished[-1][0].completion, "").tokens
                count = len(ids) - 1
                tokens = Tokens(ids, [None, *scored.logprobs[:count]], [(), *scored.top[:count]] if scored.top else ())
                if draft.both is not None:
                    samples = [self._behind(finished[0][0].completion, count)]
            echo = Echo(text, tokens)
        cached = 0
        if draft.drawn is not None:
            cached = min(sample.completion.counts.cached_tokens for sample in finished[0])
        if draft.drawn is None and draft.both is None:
            samples = [Sample("", Tokens([]), "length")] * draft.prompt.params.n
        return Answer(samples, len(ids), cached, echo)

    def _behind(self, completion: Completion, count: int) -> Sample:
        """Return what was sampled after `given` tokens."""
        ends = int(completion.token_ids[-1]) in self._ends
        drawn = replace(
            completion,
            token_ids=completion.token_ids[count:],
            logprobs=None if completion.logprobs is None else completion.logprobs[count:],
            top_ids=None if completion.top_ids is None else completion.top_ids[count:],
            top_logprobs=None if completion.top_logprobs is None else completion.top_logprobs[count:],
            finish_reason="stop" if ends else "length",
        )
        text = "" if ends else self._tokenizer.decode_batch([drawn.token_ids])[0]
        return Sample.of(drawn, text)


class _Choice:
    """One choice of a response that is streamed."""

    def __init__(self, request: Request, index: int, text: TextStream, spell: Any) -> None:
        self._request = request
        self._index = index
        self._text = text
        self._spell = spell
        self._begun = False
        self._untold: list[Tokens] = []
        """With log-probabilities."""
        self._seen = self._offset = 0
        """Number of tokens received, and where in the text the next one begins whose log-probability is reported."""

    def parts(self, output: News | Finished) -> list[dict[str, Any]]:
        """The choices of the chunks that are due; the last ones where the sample is finished."""
        done = output.completion if isinstance(output, Finished) else None
        if isinstance(output, Finished):
            self._take(Tokens.of(output.completion.token_ids, output.completion), 0)
            text = self._text.end(output.text)
        else:
            text = self._text.grow(self._take(Tokens.of(output.output.tokens, output.output), output.begin))
        parts: list[dict[str, Any]] = []
        chat = self._request.url == CHAT
        if chat and not self._begun:
            parts.append(self._part({"delta": {"role": "assistant", "content": ""}}))
        self._begun = True
        logprobs = self._logprobs() if text or done is not None else None
        if text or logprobs:
            parts.append(self._part({"delta": {"content": text}} if chat else {"text": text}, logprobs))
        if done is not None:
            parts.append(self._part({"delta": {}} if chat else {"text": ""}, None, finish_reason(done.finish_reason)))
        return parts

    def _take(self, tokens: Tokens, begin: int) -> Sequence[int]:
        """The tokens that have not come before: where a process was replaced, all come once more."""
        fresh = tokens.behind(self._seen - begin)
        self._seen += len(fresh.ids)
        if self._request.logprobs is not None and fresh.ids:
            self._untold.append(fresh)
        return fresh.ids

    def _part(self, content: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens that have not been reported."""
        if not self._untold:
            return None
        tokens, self._untold = Tokens.joined(self._untold), []
        if self._request.url == CHAT:
            return chat_logprobs(tokens, self._spell)
        begin = self._offset
        self._offset += sum(len(self._spell(token)) for token in tokens.ids)
        return text_logprobs(tokens, self._spell, begin)


def _draft(prompt: Prompt, key: int | None, request: Request, none_drawn: bool) -> _Draft:
    params, given = prompt.params, len(prompt.token_ids) - 1
    drawn = None if none_drawn else Wanted(prompt.token_ids, params, key)
    if not request.echo or request.logprobs is None or not given:
        return _Draft(prompt, drawn)
    stops = params.stop or params.stop_token_ids or params.ignore_eos
    if params.n == params.max_tokens == 1 and not params.penalised and not stops and not none_drawn:
        # The token behind the prompt comes with its scores.
        both = replace(params, max_tokens=given + 1, ignore_eos=True)
        return _Draft(prompt, both=Wanted(prompt.token_ids, both, key, given))
    alone = SamplingParams(max_tokens=given, temperature=0.0, ignore_eos=True, logprobs=params.logprobs)
    return _Draft(prompt, drawn, Wanted(prompt.token_ids, alone, key, given))


def _failure(completion: Completion) -> ApiError:
    code, message = completion.error_code or "", completion.error_message or ""
    if code == "kv_cache_overflow":
        return ApiError(message, "max_tokens", "context_length_exceeded")
    return of_row(RowError(code, message))
