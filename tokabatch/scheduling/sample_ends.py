"""When a sample ends, and the completion that is returned of it: with its finish reason, or the error that ended it.

A sample ends at a stop token or string (`stop_conditions`), at its limit of tokens, or where the model's logits are not finite
(after the scheduler has had it computed once more). A given text ends once its last token is scored (`text_scores`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.number_text import counted
from tokabatch.scheduling.contracts import WORKER_CRASH, Completion, Scores
from tokabatch.scheduling.generated import Generated
from tokabatch.scheduling.kv.slots import Slots
from tokabatch.scheduling.stop_conditions import StopRules
from tokabatch.scheduling.text_scores import RunningScores, scored
from tokabatch.scheduling.work import Work

BAD_LOGITS = ("nan_logits", "the model's logits held NaN or no finite value")


@dataclass(frozen=True, slots=True)
class Ends:
    """E samples that have ended."""

    slots: Int64
    """Shape [E]."""
    reasons: list[int | str | None]
    """The stop token id or string that ended each, or None, length E."""
    finite: Bool
    """Whether the logits were finite, shape [E]."""
    scores: list[Scores | None]
    """The scores of given texts, length E, None for samples without one; empty if the work has no given texts."""


class SampleEnds:
    """Find the samples of one scheduler that have ended."""

    def __init__(self, work: Work, slots: Slots, stops: StopRules) -> None:
        self._work = work
        self._slots = slots
        self._stops = stops
        self._scores = RunningScores()

    def add_scores(self, slots: Int64, epochs: Int32, scores: Scores | None) -> Bool:
        """See `RunningScores.add`."""
        return self._scores.add(slots, epochs, scores)

    def find(self, slots: Int64, tokens: Int32, finite: Bool, bad_texts: Int64) -> Ends:
        """Return the samples that have ended among these slots, which have drawn `tokens` from logits that were `finite` or
        not, shape [S] each; `bad_texts` holds the slots of given texts whose logits were not finite, which end too."""
        seq = self._slots
        ends: dict[int, int | str | None] = {int(i): None for i in np.nonzero(seq.generated[slots] >= seq.limit[slots])[0]}
        ends |= self._stops.find(tokens, slots, seq.params, seq.outputs)
        if not finite.all():
            ends |= {int(i): None for i in np.nonzero(~finite)[0]}
        places = np.fromiter(ends, np.int64, len(ends))
        slots, finite, reasons, scores = slots[places], finite[places], list(ends.values()), list[Scores | None]()
        if self._work.has_texts:
            slots = np.concatenate((slots, np.setdiff1d(bad_texts, slots)))
            reasons += [None] * (len(slots) - len(ends))
            whose = zip(
                slots.tolist(), seq.epoch[slots].tolist(), self._work.of_texts(seq.request[slots]).tolist(), strict=True
            )
            scores = [self._scores.take(slot, epoch) if of_text else None for slot, epoch, of_text in whose]
            finite = np.append(finite, np.ones(len(slots) - len(finite), np.bool_))
            finite &= np.array([each is None or not np.isnan(each.logprob).any() for each in scores], np.bool_)
        return Ends(slots, reasons, finite, scores)

    def completions(self, ends: Ends) -> list[Completion]:
        """Return the completions of ended samples, whose slots must still be open."""
        request = self._slots.request[ends.slots]
        columns = (self._work.row_index[request], self._slots.sample[ends.slots], self._work.length[request], ends.finite)
        ended = zip(ends.reasons, self._slots.read(ends.slots), *(column.tolist() for column in columns), strict=True)
        completions = [
            completion(output, row, sample, length, reason=reason, error=None if valid else BAD_LOGITS)
            for reason, output, row, sample, length, valid in ended
        ]
        if not ends.scores:
            return completions
        given = zip(completions, ends.scores, request.tolist(), strict=True)
        return [each if scores is None else scored(each, scores, self._work, prompt) for each, scores, prompt in given]


def completion(
    output: Generated,
    row_index: int,
    sample_index: int,
    num_prompt_tokens: int,
    *,
    reason: int | str | None = None,
    error: tuple[str, str] | None = None,
) -> Completion:
    """Return a finished sample: `reason` is the stop token or string that ended it, `error` a code and a message."""
    return Completion(
        row_index=row_index,
        sample_index=sample_index,
        token_ids=output.tokens,
        finish_reason="length" if reason is None else "stop",
        stop_reason=reason,
        num_prompt_tokens=num_prompt_tokens,
        counts=output.counts,
        logprobs=output.logprobs,
        top_ids=output.top_ids,
        top_logprobs=output.top_logprobs,
        error_code=None if error is None else error[0],
        error_message=None if error is None else error[1],
    )


def overflow(work: Work, prompt: int, page_size: int, num_pages: int) -> tuple[str, str]:
    """Return the error, code and message, of a prompt whose longest possible sample does not fit a cache of `num_pages`."""
    length, limit = int(work.length[prompt]), int(work.max_tokens[work.params[prompt]])
    needed = int(work.num_pages(np.array([prompt], np.int32), page_size)[0])
    return "kv_cache_overflow", (
        f"the prompt has {counted(length, 'token')} and max_tokens is {limit:,}, which needs "
        f"{counted(needed * page_size, 'token')} of KV cache in pages of {page_size}; the cache holds "
        f"{num_pages * page_size:,}. Shorten the prompt, lower max_tokens, or raise engine.kv_cache_tokens where memory allows"
    )


def killed(crash: str) -> tuple[str, str]:
    """Return the error, code and message, of a row that kills workers; `crash` describes the last crash."""
    return WORKER_CRASH, f"the worker process died whenever this row ran: {crash}"
