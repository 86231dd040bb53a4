"""Streams: what a process sends of the samples that are watched, and what becomes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tokabatch.openai.requests import parse_request
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.generated import Generated
from tokabatch.serve.completions import _Choice
from tokabatch.serve.dispatch import Wanted, as_requests
from tokabatch.serve.engine import News
from tokabatch.serve.engine_process import Add, Cancel, Loop
from tokabatch.serve.text_stream import TextStream


def drawn(*tokens: int) -> Generated:
    return Generated(np.array(tokens, np.int32), np.array(tokens, np.float32))


def test_what_is_new_of_streamed_samples_is_sent_until_they_are_finished_or_cancelled() -> None:
    there: list[tuple[int, int, Generated]] = []
    scheduler = SimpleNamespace(under_way=lambda rows: [each for each in there if each[0] in rows])
    replica = SimpleNamespace(extend=lambda requests: [], withdraw=lambda row: None, scheduler=scheduler)
    loop: Any = Loop(replica, None, [].append, None)  # type: ignore[arg-type]
    prompts = [Wanted(np.array([1, 2], np.int32), SamplingParams(n=n)) for n in (2, 1, 2)]
    loop._obey(Add(as_requests([5, 6, 7], prompts, np.zeros(3, np.int32)), (5, 7)))
    there[:] = [(5, 1, drawn(3, 4)), (6, 0, drawn(9)), (7, 0, drawn(8))]
    sent = [(*each[:3], each[3].tokens.tolist(), each[3].logprobs.tolist()) for each in loop._news()]
    assert sent == [(5, 1, 0, [3, 4], [3, 4]), (7, 0, 0, [8], [8])]
    there[:] = [(5, 1, drawn(3, 4, 6)), (7, 0, drawn(8))]
    assert [(*each[:3], each[3].tokens.tolist()) for each in loop._news()] == [(5, 1, 2, [6])]
    loop._finished([SimpleNamespace(row_index=row, sample_index=0) for row in (5, 6, 7)])
    assert {row: list(left) for row, left in loop._streamed.items()} == {5: [1], 7: [1]}
    loop._finished([SimpleNamespace(row_index=5, sample_index=1)])
    loop._obey(Cancel((7,)))
    assert not loop._streamed


def test_a_process_that_begins_again_repeats_nothing() -> None:
    request: Any = parse_request("/v1/completions", {"model": "m", "prompt": "x", "logprobs": 0})
    texts = "abcdefgh"

    def decode(lists: list[list[int]]) -> list[str]:
        return ["".join(texts[token] for token in tokens) for tokens in lists]

    choice = _Choice(request, 0, TextStream(decode), lambda token: texts[token])
    found = [choice.parts(News(*each)) for each in ((0, drawn(0, 1)), (2, drawn(2)), (0, drawn(0, 1)), (2, drawn(2, 3)))]
    assert [part["text"] for parts in found for part in parts] == ["ab", "c", "d"]
    offsets = [part["logprobs"]["text_offset"] for parts in found for part in parts]
    assert offsets == [[0, 1], [2], [3]]


def test_parts_of_characters_without_end_cost_what_they_are() -> None:
    decoded = 0

    def decode(lists: list[list[int]]) -> list[str]:
        nonlocal decoded
        decoded += sum(map(len, lists))
        return [bytes(tokens).decode(errors="replace") for tokens in lists]

    stream, tokens = TextStream(decode, ["é!", "xyz"]), [ord("a"), *[0xE4] * 2000]
    given = "".join(stream.grow([token]) for token in tokens)
    assert given == "a" and decoded < 10 * len(tokens)
    # What comes behind them is given out at once, but for what a stop string may begin with.
    given += stream.grow([ord("b")]) + stream.grow(list("é".encode()))
    assert given == "a" + 2000 * "\N{REPLACEMENT CHARACTER}" + "b"
    assert given + stream.grow([ord("?")]) == given + "é?"
