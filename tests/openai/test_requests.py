"""Bodies as clients send them: what is read, what passes without effect, and what is refused by name."""

from __future__ import annotations

import pytest

from tokabatch.errors import RowError
from tokabatch.openai.errors import ApiError, of_row
from tokabatch.openai.requests import CHAT, COMPLETIONS, Request, parse_request

USER = [{"role": "user", "content": "Hello"}]
RESUMED = [*USER, {"role": "assistant", "content": "Well"}]


def read(url: str, **body) -> Request:
    given = {"model": "m", **({"messages": USER} if url == CHAT else {"prompt": "Hello"}), **body}
    request = parse_request(url, given)
    assert isinstance(request, Request), request
    return request


def refused(url: str, **body) -> ApiError:
    given = {"model": "m", **({"messages": USER} if url == CHAT else {"prompt": "Hello"}), **body}
    error = parse_request(url, given)
    assert isinstance(error, ApiError), error
    return error


def test_what_lm_eval_sends():
    drawn = read(COMPLETIONS, prompt=[[1, 2], [3]], max_tokens=64, temperature=0, stop=["\n\n"], seed=1234, top_p=0.9)
    assert drawn.prompts == ((1, 2), (3,)) and not drawn.echo and drawn.logprobs is None
    settings = {"max_tokens": 64, "temperature": 0, "stop": ["\n\n"], "seed": 1234, "top_p": 0.9}
    assert drawn.rows() == [{"prompt_token_ids": ids, "sampling_params": settings} for ids in ([1, 2], [3])]
    scored = read(COMPLETIONS, prompt=[[1, 2, 3]], temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1)
    assert scored.echo and scored.logprobs == 1 and scored.settings["max_tokens"] == 1
    assert read(COMPLETIONS, echo=True, max_tokens=0).settings["max_tokens"] == 0
    assert refused(COMPLETIONS, max_tokens=0).param == "max_tokens"
    chat = read(CHAT, max_tokens=32, temperature=0.0, stop=["\n"], seed=1234)
    assert chat.rows() == [
        {"messages": USER, "sampling_params": {"max_tokens": 32, "temperature": 0.0, "stop": ["\n"], "seed": 1234}}
    ]


def test_prompts_in_all_forms():
    forms = {"a": ("a",), ("a", "b"): ("a", "b"), (1, 2): ((1, 2),), ((1,), "b"): ((1,), "b")}
    for given, prompts in forms.items():
        value = given if isinstance(given, str) else [list(each) if isinstance(each, tuple) else each for each in given]
        assert read(COMPLETIONS, prompt=value).prompts == prompts
    for wrong in ([], [[]], [1, "a"], [1.5], [True], [[1, -1]], {"a": 1}, 7, None):
        assert str(refused(COMPLETIONS, prompt=wrong).param).startswith("prompt")


def test_chat_settings():
    request = read(
        CHAT,
        n=3,
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=5,
        top_k=-1,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        min_tokens=4,
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="auto",
        chat_template_kwargs={"enable_thinking": False},
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (request.n, request.logprobs, request.stream, request.include_usage) == (3, 5, True, True)
    assert request.settings["max_tokens"] == 9 and request.settings["top_k"] == 0
    assert set(request.rows()[0]) == {"messages", "tools", "chat_template_kwargs", "sampling_params"}
    assert read(CHAT, logprobs=True).logprobs == 0 and read(CHAT, logprobs=False, top_logprobs=0).logprobs is None
    assert read(CHAT, max_tokens=5, max_completion_tokens=5).settings == {"max_tokens": 5}
    assert read(CHAT, messages=RESUMED, continue_final_message=True, add_generation_prompt=False).messages == RESUMED


def test_neutral_and_harmless_fields_pass():
    neutral = {
        "n": 1,
        "best_of": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "skip_special_tokens": True,
        "length_penalty": 1.0,
        "guided_json": None,
        "reasoning_effort": None,
        "never_heard_of": None,
        "detokenize": True,
        "include_reasoning": True,
        "kv_transfer_params": {},
        "session_id": "s",
        "stop": None,
        "seed": None,
    }
    for url in (CHAT, COMPLETIONS):
        most = {"max_tokens": 16} if url == COMPLETIONS else {}
        assert read(url, **neutral).settings == {"n": 1, "presence_penalty": 0, "logit_bias": {}, **most}
    assert read(CHAT, add_special_tokens=False) and read(COMPLETIONS, add_special_tokens=True)
    assert refused(CHAT, add_special_tokens=True).param == refused(COMPLETIONS, add_special_tokens=False).param
    assert read(CHAT, tools=[], tool_choice="none", parallel_tool_calls=True).chat == {}
    assert not read(CHAT, stream=True, stream_options={"include_usage": None, "other": None}).include_usage
    assert read(COMPLETIONS, suffix="", echo=False).rows() == [{"prompt": "Hello", "sampling_params": {"max_tokens": 16}}]


@pytest.mark.parametrize(
    ("url", "body", "param", "code"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "unsupported_parameter"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        (CHAT, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "unsupported_parameter"),
        (CHAT, {"include_stop_str_in_output": True}, "include_stop_str_in_output", "unsupported_parameter"),
        (CHAT, {"skip_special_tokens": 1}, "skip_special_tokens", "unsupported_parameter"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        (CHAT, {"logprobs": 1}, "logprobs", "invalid_type"),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": ["a"]}, "messages[0]", "invalid_type"),
        (CHAT, {"tools": [{}, None]}, "tools[1]", "invalid_type"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter"),
        (CHAT, {"messages": RESUMED, "add_generation_prompt": True}, "add_generation_prompt", "unsupported_value"),
        (CHAT, {"continue_final_message": True}, "continue_final_message", "unsupported_value"),
        (CHAT, {"prompt": "a"}, "prompt", "unknown_parameter"),
        (CHAT, {"temprature": 1}, "temprature", "unknown_parameter"),
        (CHAT, {"stream": "yes"}, "stream", "invalid_type"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (CHAT, {"model": 1}, "model", "invalid_type"),
        (CHAT, {"model": 4}, "model", "invalid_type"),
        (COMPLETIONS, {"messages": USER}, "messages", "unknown_parameter"),
        (COMPLETIONS, {"best_of": 2}, "best_of", "unsupported_parameter"),
        (COMPLETIONS, {"suffix": "end"}, "suffix", "unsupported_parameter"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"n": 0}, "n", "invalid_value"),
        (COMPLETIONS, {"n": True}, "n", "invalid_value"),
        (COMPLETIONS, {"temperature": "hot"}, "temperature", "invalid_value"),
        (COMPLETIONS, {"stop": ["a", 1]}, "stop[1]", "invalid_value"),
        (COMPLETIONS, {"seed": -1}, "seed", "invalid_value"),
        (COMPLETIONS, {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
        (COMPLETIONS, {"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        (COMPLETIONS, {"detokenize": False}, "detokenize", "unsupported_parameter"),
        (
            COMPLETIONS,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "unsupported_parameter",
        ),
    ],
)
def test_refusals_name_the_field(url, body, param, code):
    error = refused(url, **body)
    assert (error.param, error.code, error.status) == (param, code, 400)
    assert param.partition("[")[0].rpartition(".")[2] in error.message
    told = error.body()["error"]
    assert told == {"message": error.message, "type": "invalid_request_error", "param": param, "code": code}


def test_a_name_of_another_tool_is_told_as_ours():
    assert "did you mean temperature?" in refused(CHAT, temp=1).message
    assert "did you mean max_tokens?" in refused(COMPLETIONS, max_new_tokens=1).message


def test_other_urls_and_bodies_are_refused():
    other = parse_request("/v1/embeddings", {"model": "m"})
    assert isinstance(other, ApiError) and other.status == 404 and "/v1/embeddings" in other.message
    for body in ([], "text", None, 3):
        assert isinstance(parse_request(CHAT, body), ApiError)
    assert 'suffix can only be ""; leave it out' in refused(COMPLETIONS, suffix="end").message
    assert "describe its format in the prompt" in refused(CHAT, response_format={"type": "json_object"}).message
    assert "echo: true" in refused(COMPLETIONS, prompt_logprobs=1).message
    hint = refused(CHAT, temprature=1).message
    assert "did you mean temperature?" in hint


def test_a_row_s_fault_is_the_request_s_or_the_engine_s():
    long = of_row(RowError("prompt_too_long", "the prompt has 9 tokens"), "messages")
    assert (long.status, long.code, long.param, long.type) == (
        400,
        "context_length_exceeded",
        "messages",
        "invalid_request_error",
    )
    named = of_row(RowError("bad_sampling", "row 3: sampling_params.stop_token_ids names 99, but"), "messages")
    assert (named.param, named.code, named.status) == ("stop_token_ids", "invalid_value", 400)
    # A request has fields, and no columns.
    parts = of_row(RowError("bad_type", "message 0 of the column 'messages' has content parts that are not text"), "messages")
    assert parts.message == "message 0 of messages has content parts that are not text"
    assert named.message == "row 3: stop_token_ids names 99, but"
    lost = of_row(RowError("nan_logits", "the model's logits held NaN"), "messages")
    assert (lost.status, lost.code, lost.param, lost.type) == (500, "nan_logits", None, "server_error")
