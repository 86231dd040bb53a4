"""Finished samples as response objects of both urls."""

from __future__ import annotations

import json

import numpy as np

from tokabatch.openai.requests import CHAT, COMPLETIONS, Request, parse_request
from tokabatch.openai.responses import Answer, Echo, Head, Sample, Tokens, build_response, chunks
from tokabatch.scheduling.contracts import NO_COUNTS, Completion

PIECES = {1: "A", 2: " b", 3: "\N{REPLACEMENT CHARACTER}", 4: "", 5: "é"}
HEAD = Head("7", 1_700_000_000, "small", "fp_1")


def request(url: str, **body) -> Request:
    given = {"model": "m", **({"messages": [{"role": "user", "content": "x"}]} if url == CHAT else {"prompt": "x"}), **body}
    parsed = parse_request(url, given)
    assert isinstance(parsed, Request)
    return parsed


def sample(text: str, *ids: int, reason="stop", logprobs=(), top=()) -> Sample:
    return Sample(text, Tokens(ids, logprobs, top), reason)


def test_choices_of_several_prompts_are_in_order():
    asked = request(COMPLETIONS, prompt=["x", "y"], n=2)
    answers = [
        Answer([sample("a", 1), sample("b", 2, reason="length")], 3, 2),
        Answer([sample("c", 1, 2), sample("d", 1, 2, 4)], 5),
    ]
    made = build_response(asked, answers, HEAD, PIECES.__getitem__)
    assert (made["id"], made["object"], made["created"], made["model"]) == ("cmpl-7", "text_completion", 1_700_000_000, "small")
    assert [(c["index"], c["text"], c["finish_reason"], c["logprobs"]) for c in made["choices"]] == [
        (0, "a", "stop", None),
        (1, "b", "length", None),
        (2, "c", "stop", None),
        (3, "d", "stop", None),
    ]
    usage = {"prompt_tokens": 8, "completion_tokens": 7, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 2}}
    assert made["usage"] == usage


def test_log_probabilities_of_chat():
    top = ((1, -0.5), (2, -1.0)), ((5, -0.1), (3, -np.inf))
    asked = request(CHAT, logprobs=True, top_logprobs=2)
    answer = Answer([sample("A\N{REPLACEMENT CHARACTER}", 1, 3, logprobs=(-0.5, -np.inf), top=top)], 3)
    made = build_response(asked, [answer], HEAD, PIECES.__getitem__)
    assert made["object"] == "chat.completion" and made["id"] == "chatcmpl-7"
    (choice,) = made["choices"]
    assert choice["message"] == {"role": "assistant", "content": "A\N{REPLACEMENT CHARACTER}", "refusal": None}
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("A", -0.5, [65])
    assert [each["token"] for each in first["top_logprobs"]] == ["A", " b"]
    assert second["bytes"] is None and second["logprob"] == -9999.0
    assert second["top_logprobs"][0]["bytes"] == [0xC3, 0xA9]
    json.dumps(made, allow_nan=False)


def test_log_probabilities_of_completions_with_an_echo():
    """As a client that scores texts reads them: nothing for the first token, one drawn token at the end, and the greedy choice
    is the largest value of `top_logprobs`."""
    asked = request(COMPLETIONS, logprobs=1, echo=True, max_tokens=1)
    echo = Echo("A b", Tokens([1, 2], [None, -2.0], [(), ((5, -0.25),)]))
    answer = Answer([sample("", 4, reason="length", logprobs=(-0.75,), top=(((4, -0.75),),))], 2, echo=echo)
    (choice,) = build_response(asked, [answer], HEAD, PIECES.__getitem__)["choices"]
    assert choice["text"] == "A b" and choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["A", " b", ""],
        "token_logprobs": [None, -2.0, -0.75],
        "top_logprobs": [None, {"é": -0.25, " b": -2.0}, {"": -0.75}],
        "text_offset": [0, 1, 3],
    }


def test_a_completion_of_the_scheduler_becomes_a_sample():
    completion = Completion(
        row_index=0,
        sample_index=0,
        token_ids=np.array([1, 4], np.int32),
        finish_reason="stop",
        stop_reason=4,
        num_prompt_tokens=3,
        counts=NO_COUNTS,
        logprobs=np.array([-0.5, -1.0], np.float32),
        top_ids=np.array([[1], [4]], np.int32),
        top_logprobs=np.array([[-0.5], [-1.0]], np.float32),
    )
    assert Sample.of(completion, "A") == Sample("A", Tokens([1, 4], [-0.5, -1.0], [[(1, -0.5)], [(4, -1.0)]]), "stop")


def test_a_response_as_a_stream():
    for url, usage in ((CHAT, True), (COMPLETIONS, False)):
        asked = request(url, n=2, stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))
        whole = build_response(asked, [Answer([sample("a", 1), sample("b", 2)], 3)], HEAD, PIECES.__getitem__)
        parts = list(chunks(asked, whole))
        assert len(parts) == 4 + usage and {part["id"] for part in parts} == {whole["id"]}
        texts = [c["delta"].get("content") if url == CHAT else c["text"] for part in parts for c in part["choices"]]
        assert [text for text in texts if text] == ["a", "b"]
        ends = [c["finish_reason"] for part in parts for c in part["choices"]]
        assert ends == [None, "stop", None, "stop"]
        if usage:
            assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
            assert parts[0]["object"] == "chat.completion.chunk" and parts[0]["usage"] is None
