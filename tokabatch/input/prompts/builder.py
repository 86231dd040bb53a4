"""From rows to prompts: rendered by `sources`, tokenised in batches, checked against the model's context length.

`prompt.special_tokens` decides whether special tokens spelled out in a row are plain text, tokens, or an error of the row.
Reads no files except the few-shot examples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.errors import RowError
from tokabatch.input.prompts.blanking import Blank, Blanking, Span
from tokabatch.input.prompts.columns import PROMPT, PromptColumns
from tokabatch.input.prompts.notes import Spelled, describe_prompts
from tokabatch.input.prompts.row_settings import RowSettings
from tokabatch.input.prompts.sources import SAMPLING_PARAMS, Draft, PromptSource
from tokabatch.input.rows import NO_PLACES, Row, RowPlaces
from tokabatch.job import GenerationConfig, PromptConfig
from tokabatch.number_text import counted
from tokabatch.scheduling.contracts import SamplingParams

if TYPE_CHECKING:
    from tokabatch.input.tokenizer.special_token_spelling import Occurrence
    from tokabatch.input.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt, ready to be scheduled. `token_ids` has shape [length], length >= 1."""

    row_index: int
    token_ids: Int32
    params: SamplingParams
    continuations: tuple[Int32, ...] = ()
    """In mode score, the token ids of each text to score after the prompt, each with at least one id."""
    scored_whole: bool = False
    """Whether the row's own text is scored, everything after its first token."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The model's context length in tokens, and the number of ids that it has embeddings for."""

    context_length: int
    vocab_size: int


class PromptBuilder:
    """Builds the prompts of one job. `typed` and `now` are as in `PromptSource`. Raises JobError or InputError for settings
    that cannot work."""

    def __init__(
        self,
        config: PromptConfig,
        generation: GenerationConfig,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        typed: bool = False,
        now: datetime = datetime.min,
        scores: bool = False,
        trusts_plain_texts: bool = False,
        of_requests: bool = False,
    ) -> None:
        """`scores`: nothing is sampled; rows bring the texts to score in the column `prompt.continuations`, or are scored as a
        whole. `trusts_plain_texts`: special tokens spelled in a text are tokens wherever no template surrounds it, whatever
        `prompt.special_tokens` says. `of_requests`: rows are requests of OpenAI's API."""
        self._trusts_plain_texts = trusts_plain_texts
        self._policy = config.special_tokens
        self._tokenizer = tokenizer
        self._settings = RowSettings(generation, tokenizer, limits.vocab_size)
        self._limits = limits
        self._blanking = Blanking(tokenizer.special_texts, tokenizer.special_tokens.normalized)
        self._source = PromptSource(config, tokenizer, limits.vocab_size, typed=typed, now=now, of_requests=of_requests)
        self._spelled_by_examples = self._count_spelled_by_examples()
        self.chat = self._source.chat
        self._given = config.continuations if scores else None
        self.columns = self._source.columns | {self._given or SAMPLING_PARAMS}
        self._config = config
        self._spelled = Spelled()
        self._without_room, self._least_room = 0, limits.context_length
        """Of prompts that the job's max_tokens makes too long: how many, and the least that one leaves of the context."""

    @property
    def own_columns(self) -> PromptColumns:
        """The columns that the job alone determines."""
        return self._source.own

    @property
    def hidden_rows(self) -> int:
        """Number of prompts in which a special token spelled by the row was encoded as plain text."""
        return self._spelled.rows if self._policy == "text" else 0

    def describe(self, present: Collection[str], rows: int, places: RowPlaces = NO_PLACES) -> tuple[str, ...]:
        """Return notes on prompts that may not be what their author intended, once all `rows` of the input are built; `present`
        are the input's columns."""
        described = describe_prompts(
            self._config,
            rows=rows,
            spelled=self._spelled,
            chat=self.chat,
            columns=present,
            read=self.columns,
            special_texts=self._tokenizer.special_texts,
            places=places,
        )
        whole = self._given is not None and self._given not in present
        of_whole = (
            f"warning: the input has no column {self._given!r} (prompt.continuations): each row's whole text is scored",
        )
        templated = self._given is not None and self.chat and self._config.chat == "auto" and self._config.messages is None
        of_chat = (
            "warning: mode is score, and texts go through the chat template; write prompt.chat: false to score them as they "
            "are",
        )
        rows_found = counted(self._without_room, "row is", "rows are")
        of_room = (
            f"warning: {rows_found} too long beside generation.max_tokens alone: with {self._least_room} or less, or with "
            f"`context`, each fits the model's context of {counted(self._limits.context_length, 'token')}",
        )
        notes = (
            *(of_whole if whole else ()),
            *(of_chat if templated else ()),
            *(of_room if self._without_room and self._given is None else ()),
        )
        return (*self._source.describe(present), *described, *notes)

    @property
    def chat_template(self) -> str:
        """The chat template that applies to rows without tools, empty if none does."""
        return self._source.chat_template

    def own_part(self, row: Mapping[str, Any]) -> str:
        """Return the row's own part of its prompt (`PromptSource.own_part`)."""
        return self._source.own_part(row)

    def build(self, rows: Sequence[Row]) -> list[Prompt | RowError]:
        """Return a prompt or an error for each row, in order. All texts of the batch are tokenised in one call."""
        drafts = [row.error or self._draft(row.prompt_columns) for row in rows]
        given = self._find_given(rows, drafts) if self._given else {}
        quoted = self._find_quoted(rows, drafts, given)
        texts = {
            (place, -1): draft.text
            for place, draft in enumerate(drafts)
            if isinstance(draft, Draft) and draft.token_ids is None
        }
        texts |= {
            (place, number): whole
            for place, each in given.items()
            for number, whole in enumerate(each)
            if isinstance(whole, str) and not isinstance(drafts[place], RowError)
        }
        ids = self._encode(texts, drafts, quoted)
        built: list[Prompt | RowError] = []
        for place, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            if isinstance(draft, RowError):
                built.append(draft)
                continue
            prompt = ids.get((place, -1), draft.token_ids or ())
            if not self._given:
                built.append(self._finish(row, prompt))
                continue
            texts_given = None
            if place in given:
                # The text was tokenised with its prompt in front: drop as many tokens as the prompt has.
                each_given = enumerate(given[place])
                texts_given = [
                    ids[place, number][len(prompt) :] if isinstance(each, str) else each for number, each in each_given
                ]
            built.append(self._finish_scored(row, prompt, texts_given))
        return built

    def _encode(
        self,
        texts: Mapping[tuple[int, int], str],
        drafts: Sequence[Draft | RowError],
        quoted: Mapping[int, list[Occurrence]],
    ) -> dict[tuple[int, int], Sequence[int]]:
        """Return the token ids of each text. A key begins with the place of the draft that the text begins with."""
        ids: dict[tuple[int, int], Sequence[int]] = {}
        for add_bos in (False, True):
            keys = [key for key in texts if isinstance(each := drafts[key[0]], Draft) and each.add_special_tokens is add_bos]
            plain = [key for key in keys if key[0] not in quoted]
            ids |= zip(plain, self._tokenizer.encode_batch([texts[key] for key in plain], add_bos), strict=True)
            others = [key for key in keys if key[0] in quoted]
            batch = [(texts[key], quoted[key[0]]) for key in others]
            ids |= zip(others, self._tokenizer.encode_quoted(batch, add_bos), strict=True)
        return ids

    def _find_given(self, rows: Sequence[Row], drafts: list[Draft | RowError]) -> dict[int, list[str | list[int]]]:
        """Return what is scored for each row, by place: lists of token ids, or texts with the prompt in front, to be tokenised
        as a whole. Trailing white space of a plain prompt moves to its continuations, as most tokenizers split text. Rows
        without continuations are left out; where they are invalid, the row's draft becomes the error."""
        given: dict[int, list[str | list[int]]] = {}
        for place, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            value = (row.columns or {}).get(self._given or "")
            if isinstance(draft, RowError) or value is None:
                continue
            texts: list[Any] = cast("list[Any]", value) if isinstance(value, list) and value else [None]
            of_text = all(isinstance(text, str) and text for text in texts) and draft.token_ids is None
            if not of_text and not all(isinstance(text, list) and text and all(map(self._is_token, text)) for text in texts):
                drafts[place] = RowError(
                    "bad_continuations",
                    f"the column {self._given!r} must hold a list of non-empty texts, or of lists of token ids below "
                    f"{self._limits.vocab_size}; after a prompt of token ids, lists of token ids",
                )
                continue
            if of_text and draft.add_special_tokens and (begins := draft.text.rstrip()):
                space = draft.text[len(begins) :]
                drafts[place], texts = replace(draft, text=begins), [space + text for text in texts]
                draft = replace(draft, text=begins)
            given[place] = [draft.text + text for text in texts] if of_text else texts
        return given

    def _is_token(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < self._limits.vocab_size

    def _finish_scored(self, row: Row, prompt: Sequence[int], given: Sequence[Sequence[int]] | None) -> Prompt | RowError:
        """Make the prompt of a scored row; without continuations, its whole text after the first token is scored."""
        prompt, texts = (prompt[:1], [prompt[1:]]) if given is None else (prompt, given)
        if (short := next((number for number, text in enumerate(texts) if not len(text)), None)) is not None:
            what = "the text has one token alone" if given is None else f"continuation {short} adds no token to the prompt"
            return RowError("bad_continuations", f"{what}: there is nothing to score")
        params = SamplingParams(
            n=len(texts),
            max_tokens=max(map(len, texts)),
            temperature=0.0,
            ignore_eos=True,
            logprobs=self._settings.of_job.logprobs,
        )
        finished = self._finish(row, prompt, params)
        if isinstance(finished, RowError):
            return finished
        continuations = tuple(np.asarray(text, dtype=np.int32) for text in texts)
        return replace(finished, continuations=continuations, scored_whole=given is None)

    def _find_quoted(
        self, rows: Sequence[Row], drafts: list[Draft | RowError], given: Mapping[int, Sequence[str | list[int]]]
    ) -> dict[int, list[Occurrence]]:
        """Find the drafts in which special tokens spelled by the row, or by its `given` continuations, are plain text; return
        by place the special tokens that templates wrote there. Where the job rejects such a row, its draft becomes the
        error."""
        texts: dict[int, str] = {}
        behind: dict[int, list[Occurrence]] = {}
        for place, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            if isinstance(draft, Draft) and draft.token_ids is None:
                behind[place] = self._spelled_behind(draft.text, row.prompt_columns, given.get(place, ()))
                if behind[place] or self._may_spell(row.prompt_columns):
                    texts[place] = draft.text
        quoted: dict[int, list[Occurrence]] = {}
        for place, found in zip(texts, self._tokenizer.special_tokens.find(list(texts.values())), strict=True):
            occurrences = [each for each in found if each]
            written = self._written(rows[place].prompt_columns, occurrences)
            spelled = [each for each in occurrences if each not in written]
            own = [*spelled[self._spelled_by_examples :], *behind[place]]
            if (spelled or own) and self._policy == "reject":
                reason = f"the row spells the special token {(spelled or own)[0][2]!r} (prompt.special_tokens: reject)"
                drafts[place] = RowError("special_token", reason)
            elif len(written) < len(found) or own:
                if own:
                    self._spelled.note(rows[place].index, own[0][2])
                if self._policy == "text":
                    quoted[place] = written
        return quoted

    def _spelled_behind(self, text: str, row: Mapping[str, Any], given: Sequence[str | list[int]]) -> list[Occurrence]:
        """Return the special tokens spelled by the continuations of a prompt's `text`, unless they are taken as tokens; `given`
        has each continuation with the prompt in front."""
        if self._policy == "allow" or self._is_trusted(row):
            return []
        wholes = [each for each in given if isinstance(each, str) and self._blanking.may_occur(each)]
        found = self._tokenizer.special_tokens.find(wholes)
        return [each for occurrences in found for each in occurrences if each and each[1] > len(text)]

    def _is_trusted(self, row: Mapping[str, Any]) -> bool:
        return self._trusts_plain_texts and isinstance(row.get(PROMPT), str)

    def _may_spell(self, row: Mapping[str, Any]) -> bool:
        if (self._policy == "allow" or self._is_trusted(row)) and not self._source.wraps(row):
            return False
        return self._spelled_by_examples > 0 or any(map(self._blanking.may_occur, self._source.values(row)))

    def _written(self, row: Mapping[str, Any], occurrences: Sequence[Occurrence]) -> list[Occurrence]:
        """Return those special tokens of the row's prompt that templates wrote."""
        if not occurrences:
            return []

        def render(blank: Blank) -> str | None:
            draft = self._source.draft(row, blank)
            return None if isinstance(draft, RowError) else draft.text

        return _overlapping(occurrences, self._blanking.written_by(render))

    def _count_spelled_by_examples(self) -> int:
        """Count the special tokens spelled by the rows of the few-shot examples."""
        text = self._source.few_shot()
        if not text or self._policy == "allow":
            return 0
        occurrences = [each for each in self._tokenizer.special_tokens.find([text])[0] if each]
        return len(occurrences) - len(_overlapping(occurrences, self._blanking.written_by(self._source.few_shot)))

    def _finish(self, row: Row, ids: Sequence[int], params: SamplingParams | None = None) -> Prompt | RowError:
        settled = params or self._settings.of(row.prompt_columns)
        if isinstance(settled, RowError):
            return settled
        params = settled
        if not ids:
            return RowError("empty_prompt", "the prompt has no tokens")
        if self._tokenizer.vocab_size > self._limits.vocab_size and (last := max(ids)) >= self._limits.vocab_size:
            return RowError(
                "bad_token_id",
                f"the prompt uses the token {self._tokenizer.token_text(last)!r} (id {last}), but the model has embeddings for "
                f"{counted(self._limits.vocab_size, 'id')}; leave it out of the row or the template, or use weights "
                f"that have it",
            )
        room = self._limits.context_length - len(ids)
        least = max(1, params.max_tokens or params.min_tokens)
        if room < least:
            name = "max_tokens" if params.max_tokens else "min_tokens"
            given = f" and {name} is {least:,}, together {len(ids) + least:,}" if params.max_tokens or params.min_tokens else ""
            if room > 0 and params.max_tokens and params.max_tokens == self._settings.of_job.max_tokens:
                self._without_room += 1
                self._least_room = min(self._least_room, room)
            return RowError(
                "prompt_too_long",
                f"the prompt has {counted(len(ids), 'token')}{given}; the model's context is {self._limits.context_length:,}",
            )
        params = params if params.max_tokens else replace(params, max_tokens=room)
        return Prompt(row.index, np.asarray(ids, dtype=np.int32), params)

    def _draft(self, row: Mapping[str, Any]) -> Draft | RowError:
        draft = self._source.draft(row)
        limit = self._limits.context_length
        if isinstance(draft, Draft) and self._tokenizer.exceeds(draft.text, limit):
            return RowError(
                "prompt_too_long",
                f"the prompt of {counted(len(draft.text), 'character')} has more than {counted(2 * limit, 'token')}; "
                f"the model's context is {limit}",
            )
        return draft


def _overlapping(occurrences: Sequence[Occurrence], spans: Sequence[Span]) -> list[Occurrence]:
    return [each for each in occurrences if any(begin < each[1] and each[0] < end for begin, end in spans)]
