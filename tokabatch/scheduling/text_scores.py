"""The scores of given texts, collected step by step and merged into the completions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.contracts import Completion, Score, Scores
from tokabatch.scheduling.work import Work


class RunningScores:
    """Scores received so far, by slot. A preempted text is scored again from its first token, in another epoch of some slot."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, list[Scores]]] = {}

    def add(self, slots: Int64, epochs: Int32, scores: Scores | None) -> Bool:
        """Add a step's scores of R tokens, each with its slot and the slot's epoch when the step was decided. `scores` is None
        from a stand-in for the device; then every token has probability 1. Return for which tokens the logits were not finite,
        shape [R]."""
        if scores is None:
            scores = Scores(np.zeros(len(slots)), np.ones(len(slots), np.bool_))
        bad = np.isnan(scores.logprob)
        if not len(slots):
            return bad
        begins = np.flatnonzero(np.append(True, slots[1:] != slots[:-1]))
        for place, stop in zip(begins.tolist(), [*begins[1:].tolist(), len(slots)], strict=True):
            slot, epoch, part = int(slots[place]), int(epochs[place]), slice(place, stop)
            known = self._parts.get(slot)
            if known is None or known[0] != epoch:
                known = self._parts[slot] = (epoch, [])
            ids, top = scores.top_ids, scores.top_logprobs
            of_part = (None, None) if ids is None or top is None else (ids[part], top[part])
            known[1].append(Scores(scores.logprob[part], scores.greedy[part], *of_part))
        return bad

    def take(self, slot: int, epoch: int) -> Scores:
        """Remove and return all scores of the text that ends in this slot."""
        known, parts = self._parts.pop(slot)
        assert known == epoch, "the scores are another text's"
        if len(parts) == 1:
            return parts[0]
        logprob, greedy = np.concatenate([part.logprob for part in parts]), np.concatenate([part.greedy for part in parts])
        top = [
            (part.top_ids, part.top_logprobs) for part in parts if part.top_ids is not None and part.top_logprobs is not None
        ]
        if len(top) < len(parts):
            return Scores(logprob, greedy)
        # Each step reports as many alternatives as the most that any of its texts requests.
        most = min(ids.shape[1] for ids, _ in top)
        return Scores(
            logprob,
            greedy,
            np.concatenate([ids[:, :most] for ids, _ in top]),
            np.concatenate([logprobs[:, :most] for _, logprobs in top]),
        )


def scored(completion: Completion, scores: Scores, work: Work, prompt: int) -> Completion:
    """Return the completion of a given text with the text's tokens and scores: in place of all that was drawn, or, if the text
    is the beginning of a sample, in place of that beginning. A completion with an error is returned unchanged."""
    if completion.error_code is not None:
        return completion
    if work.continuations is None:
        return _begun_by(completion, scores, work.given_tokens(prompt))
    given = work.continuation(prompt, completion.sample_index)
    assert len(given) == len(scores.logprob), "a token has no score, or two"
    reported = work.sampling[int(work.params[prompt])].logprobs is not None
    return replace(
        completion,
        token_ids=given,
        finish_reason="scored",
        stop_reason=None,
        logprobs=scores.logprob.astype(np.float32) if reported else None,
        score=Score(float(scores.logprob.sum()), bool(scores.greedy.all())),
    )


def _begun_by(completion: Completion, scores: Scores, given: Int32) -> Completion:
    """Return a sample that begins with a given text, with that text's tokens and scores. Where nothing is drawn after the
    text, the text's last token replaces the one token that was drawn."""
    count, drawn = len(given), len(completion.token_ids) > len(given)
    assert count == len(scores.logprob), "a token has no score, or two"
    merged = replace(completion, token_ids=np.concatenate((given, completion.token_ids[count:])))
    if completion.logprobs is not None:
        own = scores.logprob.astype(np.float32)
        merged = replace(merged, logprobs=np.concatenate((own, completion.logprobs[count:])))
    if completion.top_ids is not None and completion.top_logprobs is not None:
        most = completion.top_ids.shape[1]
        assert scores.top_ids is not None and scores.top_logprobs is not None
        merged = replace(
            merged,
            top_ids=np.concatenate((scores.top_ids[:, :most], completion.top_ids[count:])),
            top_logprobs=np.concatenate((scores.top_logprobs[:, :most], completion.top_logprobs[count:])),
        )
    return merged if drawn else replace(merged, finish_reason="scored", stop_reason=None)
