"""Finished samples arrive in another process as they were, whatever they carry."""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
import pytest

from tokabatch.scheduling.completion_batch import CompletionBatch, PackedCompletions, PackedOnTheWay
from tokabatch.scheduling.contracts import Completion, SampleCounts


def sample(index: int, tokens: int, alternatives: int | None = None, **values) -> Completion:
    rng = np.random.default_rng(index)
    scored = alternatives is not None
    return Completion(
        row_index=index,
        sample_index=index % 3,
        token_ids=rng.integers(0, 99, tokens).astype(np.int32),
        finish_reason="stop" if index % 2 else "length",
        stop_reason=("\n", 7, None)[index % 3],
        num_prompt_tokens=index + 5,
        counts=SampleCounts(index),
        logprobs=rng.random(tokens).astype(np.float32) if scored else None,
        top_ids=rng.integers(0, 99, (tokens, alternatives)).astype(np.int32) if scored else None,
        top_logprobs=rng.random((tokens, alternatives)).astype(np.float32) if scored else None,
        **values,
    )


@pytest.mark.parametrize(
    "completions",
    [
        [],
        [sample(0, 0)],
        [sample(0, 3), sample(1, 1), sample(2, 200)],
        [sample(0, 3, 2), sample(1, 0, 5), sample(2, 4), sample(3, 2, 0)],
        [sample(1, 2, error_code="no_room", error_message="none"), sample(2, 1)],
    ],
)
def test_a_batch_arrives_as_it_was(completions):
    packed = pickle.loads(pickle.dumps(PackedOnTheWay(completions)))
    assert isinstance(packed, PackedCompletions)
    assert packed.row_index.tolist() == [each.row_index for each in completions]
    assert packed.sample_index.tolist() == [each.sample_index for each in completions]
    assert packed.num_tokens.tolist() == [len(each.token_ids) for each in completions]
    assert packed.stopped.tolist() == [each.finish_reason == "stop" for each in completions]
    assert packed.failed.tolist() == [each.error_code is not None for each in completions]
    twice = PackedCompletions.joined([packed, packed])
    same(completions, packed)
    same([*completions, *completions], twice)
    same(completions, pickle.loads(pickle.dumps(CompletionBatch(completions))))


def same(completions, arrived):
    assert len(arrived) == len(completions)
    for ours, theirs in zip(completions, arrived, strict=True):
        for field in fields(Completion):
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            assert type(mine) is type(other)
            if isinstance(mine, np.ndarray):
                assert mine.dtype == other.dtype and mine.shape == other.shape
                np.testing.assert_array_equal(mine, other)
            else:
                assert mine == other
