"""The fields of completions and chat requests: which are read, which pass without effect, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from tokabatch.job.names_elsewhere import our_name
from tokabatch.openai.errors import ApiError, unsupported

SETTINGS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words"),
)
"""Fields that are settings of the same name; `top_k` -1 is off, as other servers have it."""
_NO_EFFECT = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("parallel_tool_calls", "cache_salt", "priority", "request_id", "session_id", "stream_interval"),
    )
)
"""Fields that change no answer."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "add_special_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (-1,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "include_reasoning": (True,),
    "watermarking": (False,),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
"""Fields that are not honoured, with the values that request what happens anyway; null is one for every field."""
_REFUSED = frozenset(
    (
        *("reasoning_effort", "verbosity", "audio", "prediction", "web_search_options", "chat_template", "prompt_logprobs"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "allowed_token_ids"),
        *("logits_processors", "logprob_token_ids", "prompt_embeds", "repetition_detection", "thinking_token_budget"),
    )
)
"""Further known fields that are not honoured."""
_DESCRIBE = "output is not constrained here: describe its format in the prompt, and leave the field out"
_INSTEAD = {
    "prompt_logprobs": "echo: true with logprobs, of /v1/completions, gives the log-probabilities of a prompt",
    **dict.fromkeys(("response_format", "structured_outputs", "allowed_token_ids"), _DESCRIBE),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _DESCRIBE),
}
_COMMON = frozenset((*SETTINGS, "model", "logprobs", "stream", "stream_options", "best_of", "echo"))
_OF_CHAT = frozenset(
    (
        *("messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "documents", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message"),
    )
)
_OF_COMPLETIONS = frozenset(("prompt",))


def refuse_field(name: str, value: Any, chat: bool) -> ApiError | None:
    """Return why a field that is not null cannot be in a request of this kind: it is unknown, or it would change the answer and
    cannot be honoured. None for a field that is read, has a neutral value or changes nothing."""
    known = _COMMON | (_OF_CHAT if chat else _OF_COMPLETIONS)
    if name in known or name in _NO_EFFECT:
        return None
    if name in _NEUTRAL:
        # A chat template writes what a plain prompt gets in front.
        accepted = (not chat,) if name == "add_special_tokens" else _NEUTRAL[name]
        if any(value == each and isinstance(value, bool) is isinstance(each, bool) for each in accepted):
            return None
        written = " or ".join(json.dumps(each, ensure_ascii=False) for each in accepted)
        return unsupported(name, f"can only be {written}; {_INSTEAD.get(name, 'leave it out')}")
    if name in _REFUSED:
        return unsupported(name, f"is not supported; {_INSTEAD.get(name, 'leave it out')}")
    ours = our_name((name,))
    near = [ours] if ours in known else get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if name in _OF_CHAT | _OF_COMPLETIONS:
        hint = f"; it belongs to {'/v1/completions' if chat else '/v1/chat/completions'}"
    return ApiError(f"{name} is not a field of this request{hint}", name, "unknown_parameter")
