"""The scores of given texts while their tokens come in, some with each step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.contracts import Completion, Score, Scores
from tokabatch.scheduling.work import Work


class RunningScores:
    """By slot. A text that is preempted is scored from its first token on again, in another epoch of some slot."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, list[Scores]]] = {}
        self.bad: Bool = np.zeros(0, np.bool_)
        """Of the step taken in last, shape [R]: the logits were not finite."""

    def add(self, slots: Int64, epochs: Int32, scores: Scores | None) -> None:
        """Take in a step's scores, shape [R], each with its slot and that one's epoch when the step was decided. None comes
        from a stand-in for the device: all tokens are certain."""
        if scores is None:
            scores = Scores(np.zeros(len(slots)), np.ones(len(slots), np.bool_))
        self.bad = np.isnan(scores.logprob)
        if not len(slots):
            return
        begins = np.flatnonzero(np.append(True, slots[1:] != slots[:-1]))
        for begin, stop in zip(begins.tolist(), [*begins[1:].tolist(), len(slots)], strict=True):
            slot, epoch = int(slots[begin]), int(epochs[begin])
            known = self._parts.get(slot)
            if known is None or known[0] != epoch:
                known = self._parts[slot] = (epoch, [])
            known[1].append(Scores(scores.logprob[begin:stop], scores.greedy[begin:stop]))

    def take(self, slot: int, epoch: int) -> Scores:
        """All scores of the text that ends in this slot."""
        known, parts = self._parts.pop(slot)
        assert known == epoch, "the scores are another text's"
        return Scores(np.concatenate([part.logprob for part in parts]), np.concatenate([part.greedy for part in parts]))


def scored(completion: Completion, scores: Scores, work: Work, prompt: int) -> Completion:
    """What was drawn, with the given text and its scores in the place of the last token, which means nothing. One with an error
    stays as it is."""
    if completion.error_code is not None:
        return completion
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
