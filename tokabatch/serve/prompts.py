"""From the rows of requests to prompts, beside the event loop.

One thread tokenises; what comes meanwhile is its next batch. The builder of prompts is made anew now and then: it shows
templates the time, and keeps what it has seen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any

from tokabatch.errors import STOPS, EngineError, RowError
from tokabatch.input.prompts.builder import Limits, Prompt, PromptBuilder
from tokabatch.input.rows import Row
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import GenerationConfig, PromptConfig

RENEW_SECONDS = 60.0
Rows = Sequence[Mapping[str, Any]]


class Prompts:
    """Made once for a server. Raises JobError or InputError where its settings cannot work."""

    def __init__(self, config: PromptConfig, generation: GenerationConfig, tokenizer: Tokenizer, limits: Limits) -> None:
        self._made_of = config, generation, tokenizer, limits
        self._renew()
        self._thread = ThreadPoolExecutor(1, "prompts")
        self._waiting: list[tuple[Rows, asyncio.Future[list[Prompt | RowError]]]] = []
        self._busy: asyncio.Task[None] | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be answered."""
        return bool(self._chat.chat_template)

    def limit(self, context: int) -> None:
        """From the next prompt on, limit the tokens of a prompt and its sample to this number."""
        config, generation, tokenizer, limits = self._made_of
        self._made_of = config, generation, tokenizer, replace(limits, context_length=context)
        self._until = 0.0

    async def build(self, rows: Rows) -> list[Prompt | RowError]:
        """A prompt, or what is wrong, for each row. Raises EngineError where the tokenizer fails."""
        future: asyncio.Future[list[Prompt | RowError]] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, future))
        if self._busy is None or self._busy.done():
            self._busy = asyncio.create_task(self._work())
        return await future

    async def run(self, function: Any, *arguments: Any) -> Any:
        """Call what uses the tokenizer, in the thread that does. Raises EngineError where the tokenizer fails."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, _call, function, *arguments)

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            flat = [row for rows, _ in batch for row in rows]
            try:
                built = iter(await self.run(self._build, flat))
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for rows, future in batch:
                prompts = [next(built) for _ in rows]
                if not future.done():
                    future.set_result(prompts)

    def _build(self, rows: Rows) -> list[Prompt | RowError]:
        if time.monotonic() > self._until:
            self._renew()
        listed = [Row(index, columns) for index, columns in enumerate(rows)]
        chats = iter(self._chat.build([row for row in listed if "messages" in rows[row.index]]))
        plain = iter(self._plain.build([row for row in listed if "messages" not in rows[row.index]]))
        return [next(chats if "messages" in row else plain) for row in rows]

    def _renew(self) -> None:
        config, generation, tokenizer, limits = self._made_of
        # A prompt that is a text is continued as it is.
        plain = config.model_copy(update={"chat": False, "system": None})
        # A client's plain prompt holds its whole conversation, special tokens included, unless the settings say otherwise.
        trusted = "special_tokens" not in config.model_fields_set
        self._plain, self._chat = (
            PromptBuilder(each, generation, tokenizer, limits, now=datetime.now(), trusts_plain_texts=trusted, of_requests=True)
            for each in (plain, config)
        )
        self._until = time.monotonic() + RENEW_SECONDS


def _call(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (Exception, *STOPS):
        raise
    except BaseException as error:
        # A panic of the tokenizer would end the task that other requests wait for.
        raise EngineError(f"the tokenizer failed: {error}") from error
