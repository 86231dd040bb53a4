"""The routes of the server: HTTP in and out. `tokabatch.openai` says what requests mean, `completions` answers them."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tokabatch.errors import RowError
from tokabatch.input.files.strict_json import parse_object
from tokabatch.input.prompts.builder import Prompt
from tokabatch.number_text import counted
from tokabatch.openai.errors import ApiError, of_row
from tokabatch.openai.requests import parse_request
from tokabatch.openai.responses import Head
from tokabatch.serve.batches import Batches
from tokabatch.serve.completions import Completions, Refused
from tokabatch.serve.engine import Engine
from tokabatch.serve.file_routes import FileRoutes
from tokabatch.serve.metrics import render
from tokabatch.serve.prompts import Prompts
from tokabatch.serve.settings import ServerConfig
from tokabatch.serve.stored_files import StoredFiles
from tokabatch.workload.open_model import OpenModel

CLIENT_GONE = 499
"""The status noted for a client that was gone before its answer."""
LARGE_BODY = 1 << 16
"""Bytes from which on a body is parsed beside the event loop, which it would hold up."""
Result = TypeVar("Result")
Handler = Callable[[HttpRequest], Awaitable[Response]]


class Api:
    """The application of one server; `app` is its ASGI callable."""

    def __init__(
        self,
        config: ServerConfig,
        name: str,
        model: OpenModel,
        engine: Engine,
        prompts: Prompts,
        context: int,
        files: StoredFiles | None,
        batches: Batches | None,
    ) -> None:
        """`name` is what requests call the model; `files` and `batches` are None where they are not served."""
        self.draining = False
        """No more requests are taken."""
        self.answered: dict[int, int] = {}
        """Responses by status."""
        self._config = config
        self._name = name
        self._model = model
        self._engine = engine
        self._prompts = prompts
        self.context = context
        """Most tokens of a prompt and its sample."""
        self._completions = Completions(engine, prompts, model.tokenizer, model.eos_token_ids, config.max_request_tokens)
        self._created = int(time.time())
        routes: list[tuple[str, Handler, str]] = [
            ("/v1/completions", self._complete, "POST"),
            ("/v1/chat/completions", self._complete, "POST"),
            ("/v1/models", self._models, "GET"),
            ("/v1/models/{name:path}", self._models, "GET"),
            ("/tokenize", self._tokenize, "POST"),
            ("/detokenize", self._detokenize, "POST"),
            ("/tokenizer_info", self._tokenizer_info, "GET"),
            ("/metrics", self._metrics, "GET"),
            ("/version", self._version, "GET"),
        ]
        if files is not None and batches is not None:
            routes += FileRoutes(files, batches, self._object, config.max_file).routes
        self._paths = ("/health", *dict.fromkeys(path.replace(":path", "") for path, _, _ in routes))
        guarded = [Route(path, self._guard(handler), methods=[method]) for path, handler, method in routes]
        # Browsers send preflight requests (CORS) without a key.
        cors = Middleware(CORSMiddleware, allow_origins=config.allow_origins, allow_methods=["*"], allow_headers=["*"])
        self.app = Starlette(
            routes=[Route("/health", self._health), *guarded],
            middleware=[cors] if config.allow_origins else [],
            exception_handlers={404: self._no_route, 405: self._no_route, 500: self._failed},
        )

    def _guard(self, handler: Handler) -> Handler:
        """Check the key, and answer a request that is refused in the API's form."""
        key = self._config.api_key

        async def guarded(http: HttpRequest) -> Response:
            given = http.headers.get("authorization", "")
            # The scheme's name is the same in lower case (RFC 9110, 11.1).
            given = given[7:] if given[:7].lower() == "bearer " else given
            try:
                # Starlette reads headers as Latin-1, in which every byte is a character.
                if key is not None and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
                    error = ApiError("the API key is wrong or missing (Authorization: Bearer …)", None, "invalid_api_key", 401)
                    raise Refused(error)
                response = await handler(http)
            except Refused as refused:
                headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
                response = JSONResponse(refused.error.body(), refused.error.status, headers)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            self.answered[response.status_code] = self.answered.get(response.status_code, 0) + 1
            return response

        return guarded

    async def _complete(self, http: HttpRequest) -> Response:
        request = await self._body(http, partial(parse_request, http.url.path))
        if isinstance(request, ApiError):
            raise Refused(request)
        self._check_model(request.model)
        if self.draining:
            raise Refused(ApiError("the server is being stopped", code="shutting_down", status=503), 5)
        head = Head(uuid.uuid4().hex, int(time.time()), self._name)
        if not request.stream:
            return JSONResponse(await _while_connected(http, self._completions.answer(request, head)))
        if request.echo:
            await self._completions.prepare(request)
            return EventStream(self._completions.stream_whole(request, head))
        return EventStream(self._completions.stream(request, await self._completions.prepare(request), head))

    def _check_model(self, name: Any) -> None:
        """Raises Refused where a request names another."""
        if name not in (None, self._name):
            message = f"the model {name!r} is not served here; this server has {self._name!r}"
            raise Refused(ApiError(message, "model", "model_not_found", 404))

    async def _models(self, http: HttpRequest) -> Response:
        described = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "tokabatch",
            "max_model_len": self.context,
        }
        wanted = http.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [described]})
        if wanted != self._name:
            raise Refused(ApiError(f"the model {wanted!r} is not served here", "model", "model_not_found", 404))
        return JSONResponse(described)

    async def _health(self, http: HttpRequest) -> Response:
        engine = self._engine
        healthy = engine.ready and bool(engine.standings) and not self.draining
        return JSONResponse({"replicas": engine.replicas, "loaded": len(engine.standings)}, 200 if healthy else 503)

    async def _version(self, http: HttpRequest) -> Response:
        return JSONResponse({"version": version("tokabatch")})

    async def _tokenize(self, http: HttpRequest) -> Response:
        sent = await self._object(http)
        # Other servers give them where they are asked for.
        body = {name: value for name, value in sent.items() if (name, value) != ("return_token_strs", False)}
        self._check_model(body.get("model"))
        if body.get("messages") is not None:
            parsed = parse_request("/v1/chat/completions", body)
            built = [parsed] if isinstance(parsed, ApiError) else await self._prompts.build(parsed.rows())
            if isinstance(built[0], ApiError | RowError):
                raise Refused(built[0] if isinstance(built[0], ApiError) else of_row(built[0], "messages"))
            assert isinstance(built[0], Prompt)
            ids = built[0].token_ids.tolist()
        else:
            _check_fields(body, "prompt", "add_special_tokens")
            text, special = body.get("prompt"), body.get("add_special_tokens")
            special = True if special is None else special
            if not isinstance(text, str):
                raise Refused(ApiError("prompt must be text", "prompt", "invalid_type"))
            if not isinstance(special, bool):
                raise Refused(ApiError("add_special_tokens must be true or false", "add_special_tokens", "invalid_type"))
            ids = (await self._prompts.run(self._model.tokenizer.encode_batch, [text], special))[0]
        return JSONResponse({"count": len(ids), "max_model_len": self.context, "tokens": ids, "token_strs": None})

    async def _detokenize(self, http: HttpRequest) -> Response:
        body = await self._object(http)
        self._check_model(body.get("model"))
        _check_fields(body, "tokens")
        tokens: Any = body.get("tokens")
        most = self._model.spec.vocab_size
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < most for token in tokens):
            raise Refused(ApiError(f"tokens must be a list of token ids below {most}", "tokens", "invalid_value"))
        texts = await self._prompts.run(lambda: self._model.tokenizer.decode_batch([tokens], skip_special_tokens=False))
        return JSONResponse({"prompt": texts[0]})

    async def _tokenizer_info(self, http: HttpRequest) -> Response:
        tokenizer = self._model.tokenizer
        templates = tokenizer.chat_templates
        return JSONResponse(
            {**tokenizer.named_special_tokens, "chat_template": templates.get("default"), "max_model_len": self.context}
        )

    async def _metrics(self, http: HttpRequest) -> Response:
        return PlainTextResponse(render(self._engine, self.answered), media_type="text/plain; version=0.0.4")

    async def _no_route(self, http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what, code = (
            (f"is not served; the paths are {', '.join(self._paths)}", "not_found")
            if error.status_code == 404
            else (f"does not take {http.method}", "method_not_allowed")
        )
        self.answered[error.status_code] = self.answered.get(error.status_code, 0) + 1
        body = ApiError(f"{http.url.path} {what}", None, code, error.status_code).body()
        return JSONResponse(body, error.status_code, error.headers)

    async def _failed(self, http: HttpRequest, error: Exception) -> Response:
        """A defect, whose traceback goes to standard error."""
        self.answered[500] = self.answered.get(500, 0) + 1
        message = f"the server failed on this request: {type(error).__name__}; please report this with its standard error"
        return JSONResponse(ApiError(message, None, "internal_error", 500).body(), 500)

    async def _object(self, http: HttpRequest) -> dict[str, Any]:
        return await self._body(http, lambda sent: sent)

    async def _body(self, http: HttpRequest, read: Callable[[dict[str, Any]], Result]) -> Result:
        """What `read` makes of the JSON object that was sent; of a large one, beside the event loop. Raises Refused."""
        most = self._config.max_body
        too_large = ApiError(f"the body has more than {counted(most, 'byte')} (server.max_body)", None, "body_too_large", 413)
        encoding = http.headers.get("content-encoding", "identity")
        if encoding != "identity":
            message = f"a body of Content-Encoding {encoding!r} cannot be read; send it as it is"
            raise Refused(ApiError(message, None, "unsupported_encoding", 415))
        length = http.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise Refused(too_large)
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > most:
                raise Refused(too_large)

        if not body.strip():
            raise Refused(ApiError("the body is empty; send a JSON object", None, "invalid_json"))

        def parse() -> Result:
            parsed = parse_object(bytes(body))
            if isinstance(parsed, RowError):
                raise Refused(of_row(parsed))
            return read(parsed)

        return parse() if len(body) < LARGE_BODY else await asyncio.to_thread(parse)


class EventStream(Response):
    """Server-sent events of JSON objects. A client that is gone ends what makes them; so does an error object."""

    def __init__(self, events: AsyncGenerator[dict[str, Any]]) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_until_gone(receive))
        await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, gone):
            task.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await sending

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
                    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
            except Refused as refused:
                text = json.dumps(refused.error.body(), ensure_ascii=False)
                await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _check_fields(body: Mapping[str, Any], *known: str) -> None:
    """Raises Refused for a field that is not read, `model` apart; null is a field that is not there."""
    if unknown := next((name for name in body if name not in ("model", *known) and body[name] is not None), None):
        message = f"{unknown} is not a field of this request; it has {' and '.join(known)}"
        raise Refused(ApiError(message, unknown, "unknown_parameter"))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _while_connected(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """Return the result. If the client disconnects first, cancel the work and raise ClientDisconnect."""
    working, gone = asyncio.ensure_future(work), asyncio.create_task(_until_gone(http.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Refused):
                await working
