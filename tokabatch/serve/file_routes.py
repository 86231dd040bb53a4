"""The routes of files and batches: HTTP in and out."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from tokabatch.number_text import counted
from tokabatch.openai.errors import ApiError
from tokabatch.serve.batches import Batches
from tokabatch.serve.completions import Refused
from tokabatch.serve.stored_files import StoredFile, StoredFiles, new_id

Body = Callable[[HttpRequest], Awaitable[dict[str, Any]]]
Handler = Callable[[HttpRequest], Awaitable[Response]]
MOST_LISTED = 10_000


class FileRoutes:
    """Handlers by path and method."""

    def __init__(self, files: StoredFiles, batches: Batches, body: Body, most: int) -> None:
        """`body` reads a JSON object; `most` bytes may a file have."""
        self._files = files
        self._batches = batches
        self._body = body
        self._most = most
        routes: list[tuple[str, Handler, str]] = [
            ("/v1/files", self._upload, "POST"),
            ("/v1/files", self._list_files, "GET"),
            ("/v1/files/{name}", self._get_file, "GET"),
            ("/v1/files/{name}", self._delete, "DELETE"),
            ("/v1/files/{name}/content", self._content, "GET"),
            ("/v1/batches", self._create, "POST"),
            ("/v1/batches", self._list_batches, "GET"),
            ("/v1/batches/{name}", self._get_batch, "GET"),
            ("/v1/batches/{name}/cancel", self._cancel, "POST"),
        ]
        self.routes = [(path, _stored(handler), method) for path, handler, method in routes]

    async def _upload(self, http: HttpRequest) -> Response:
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(
                ApiError("a file is sent as multipart/form-data, with fields purpose and file", "file", "invalid_type")
            )
        try:
            form = await MultiPartParser(http.headers, self._limited(http), max_files=1, max_fields=8).parse()
        except MultiPartException as error:
            raise Refused(ApiError(f"the form cannot be read: {error.message}", None, "invalid_form")) from error
        try:
            purpose, file = form.get("purpose"), form.get("file")
            if unknown := next((name for name in form if name not in ("purpose", "file")), None):
                raise Refused(ApiError(f"{unknown} is not supported; leave it out", unknown, "unsupported_parameter"))
            if purpose != "batch":
                raise Refused(ApiError(f"purpose must be 'batch', not {purpose!r}", "purpose", "invalid_value"))
            if not isinstance(file, UploadFile):
                raise Refused(ApiError("file is missing", "file", "missing_required_parameter"))
            stored = await asyncio.to_thread(self._keep, file)
        finally:
            await form.close()
        return JSONResponse(stored.body())

    def _keep(self, file: UploadFile) -> StoredFile:
        name = new_id("file")
        place = self._files.path(name, ".upload")
        try:
            with place.open("wb") as target:
                shutil.copyfileobj(file.file, target, 1 << 20)
            return self._files.put(name, file.filename or "", "batch", place)
        except OSError:
            place.unlink(missing_ok=True)
            raise

    async def _limited(self, http: HttpRequest) -> AsyncGenerator[bytes, None]:
        length = 0
        async for part in http.stream():
            length += len(part)
            if length > self._most:
                message = f"the file has more than {counted(self._most, 'byte')} (server.max_file)"
                raise Refused(ApiError(message, "file", "file_too_large", 413))
            yield part

    async def _list_files(self, http: HttpRequest) -> Response:
        purpose, order = http.query_params.get("purpose"), http.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Refused(ApiError(f"order must be asc or desc, not {order!r}", "order", "invalid_value"))
        found = [file for file in self._files.all() if purpose in (None, file.purpose)]
        ordered = found if order == "asc" else found[::-1]
        return _page(http, [file.id for file in ordered], lambda at: ordered[at].body())

    async def _get_file(self, http: HttpRequest) -> Response:
        return JSONResponse(self._file(http).body())

    async def _content(self, http: HttpRequest) -> Response:
        path = self._files.path(self._file(http).id)
        path.stat()
        return FileResponse(path, media_type="application/octet-stream")

    async def _delete(self, http: HttpRequest) -> Response:
        file = self._file(http)
        if (batch := self._batches.uses(file.id)) is not None:
            message = f"{file.id} is the input of {batch}, which is not over; cancel that first"
            raise Refused(ApiError(message, "file_id", "file_in_use"))
        self._files.delete(file.id)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})

    def _file(self, http: HttpRequest) -> StoredFile:
        name = http.path_params["name"]
        file = self._files.get(name)
        if file is None:
            raise Refused(ApiError(f"there is no file {name!r}", "file_id", "not_found", 404))
        return file

    async def _create(self, http: HttpRequest) -> Response:
        return JSONResponse(self._batches.create(await self._body(http)))

    async def _list_batches(self, http: HttpRequest) -> Response:
        found = self._batches.all()[::-1]
        return _page(http, [batch["id"] for batch in found], found.__getitem__)

    async def _get_batch(self, http: HttpRequest) -> Response:
        return JSONResponse(self._batches.get(http.path_params["name"]))

    async def _cancel(self, http: HttpRequest) -> Response:
        return JSONResponse(self._batches.cancel(http.path_params["name"]))


def _stored(handler: Handler) -> Handler:
    """Refuse with 503 what the disk does not allow for now."""

    async def checked(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except (ConnectionError, TimeoutError):
            raise  # The client's.
        except OSError as error:
            message = f"the server's files cannot be read or written: {error.strerror or error}"
            raise Refused(ApiError(message, None, "storage", 503), 60) from error

    return checked


def _page(http: HttpRequest, ids: Sequence[str], show: Callable[[int], dict[str, Any]]) -> Response:
    """A part of a list: at most `limit` objects behind the one named by `after`. `show` makes an object by its place."""
    limit = http.query_params.get("limit", "20" if "batches" in http.url.path else str(MOST_LISTED))
    after = http.query_params.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= MOST_LISTED:
        raise Refused(ApiError(f"limit must be a number from 1 to {MOST_LISTED:,}", "limit", "invalid_value"))
    if after is not None and after not in ids:
        raise Refused(
            ApiError(f"after names {after!r}, which is not in the list; begin again without it", "after", "not_found")
        )
    begin = 0 if after is None else ids.index(after) + 1
    places = range(begin, min(begin + int(limit), len(ids)))
    ends = (ids[places[0]], ids[places[-1]]) if places else (None, None)
    body = {"object": "list", "data": [show(at) for at in places], "first_id": ends[0], "last_id": ends[1]}
    return JSONResponse({**body, "has_more": places.stop < len(ids)})
