"""Generation settings in a model's own files: sampling defaults for what the job leaves open, and the end tokens.

Reads `generation_config.json` and `config.json` of a local model folder, without transformers or the hub.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from tokabatch.errors import ModelError
from tokabatch.job import GenerationConfig, Job, Setting

GENERATION_CONFIG, CONFIG, TOKENIZER = "generation_config.json", "config.json", "the tokenizer"
NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_length": 20,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
"""Values of keys that have no effect."""
HONOURED_SAMPLING = frozenset(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"))
"""Keys whose values apply unless the job gives its own."""
HONOURED = HONOURED_SAMPLING | {"do_sample", "eos_token_id"}
GREEDY_TOO = frozenset(("repetition_penalty",))
"""Those that also affect greedy decoding."""
WITHOUT_EFFECT = frozenset(
    (
        *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config"),
        *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "low_memory", "compile_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "disable_compile", "target_lookbehind"),
        *("assistant_early_exit", "assistant_lookbehind", "trust_remote_code"),
    )
)
"""Keys that do not decide which tokens are sampled."""
OWN_KEYS = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "bad_words_ids": "bad_words",
    "sequence_bias": "logit_bias",
    **{name: name for name in ("presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "bad_words")},
}
"""Keys that a key of the job's section `generation` overrides."""


class NamesTokens(Protocol):
    """The part of a tokenizer that names its end token and its special tokens by id."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def special_by_id(self) -> Mapping[int, str]: ...


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The ids that end a sample, and a note if the model's files disagree on them."""

    ids: tuple[int, ...]
    note: str | None = None


def effective_generation(job: Job, folder: Path) -> tuple[GenerationConfig, tuple[Setting, ...]]:
    """Return the job's generation with the model's defaults for what the job leaves open, and where each value came from.

    The sampling defaults of a model whose file says `do_sample: false` are left out: they would not be used there, either.
    """
    defaults = _read(folder / GENERATION_CONFIG)
    honoured = GREEDY_TOO if defaults.get("do_sample") is False else HONOURED_SAMPLING
    return job.generation.with_model_defaults({name: value for name, value in defaults.items() if name in honoured})


def describe_ignored(folder: Path, job: Job, settings: Sequence[Setting]) -> tuple[str, ...]:
    """Return notes on keys and values of generation_config.json that the run does not follow."""
    defaults = _read(folder / GENERATION_CONFIG)
    given = job.generation.model_fields_set
    sentences: list[str] = []
    if defaults.get("do_sample") is False and "temperature" not in given:
        sentences.append(
            f"{GENERATION_CONFIG} says do_sample: false, which is greedy; here generation.temperature decides, and it is "
            f"{job.generation.temperature:g}: write 0 for greedy"
        )
    taken = {setting.key for setting in settings if setting.source != "default"}
    unused = {
        key: value
        for key, value in defaults.items()
        if value is not None
        and key not in WITHOUT_EFFECT
        and OWN_KEYS.get(key) not in given
        and (key not in HONOURED or _refused(key, defaults, taken))
        and value != NEUTRAL.get(key)
        and value not in ([], {})
    }
    if isinstance(ids := unused.get("eos_token_id"), list):
        unused["eos_token_id"] = [each for each in cast("list[Any]", ids) if not _is_id(each)]
    if unused:
        listed = ", ".join(f"{key}: {_shortened(value)}" for key, value in unused.items())
        bound = "; generation.max_tokens bounds a sample" if unused.keys() & {"max_new_tokens", "max_length"} else ""
        sentences.append(f"{GENERATION_CONFIG} also says {listed}, which is not used here{bound}")
    return tuple(sentences)


def find_end_tokens(folder: Path, tokenizer: NamesTokens) -> EndTokens:
    """Return the model's end tokens: those of generation_config.json, else of config.json, and any other special token that
    either file or the tokenizer names as one. May be empty."""
    named = {name: _ids(_read(folder / name).get("eos_token_id")) for name in (GENERATION_CONFIG, CONFIG)}
    named[TOKENIZER] = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    named = {name: ids for name, ids in named.items() if ids}
    first = next(iter(named.values()), ())
    every = tuple(dict.fromkeys(token for ids in named.values() for token in ids))
    ends = tuple(token for token in every if token in first or token in tokenizer.special_by_id)
    if set(every) == set(first):
        return EndTokens(ends)

    def shown(ids: Sequence[int]) -> str:
        special = tokenizer.special_by_id
        return ", ".join(f"{token} {special[token]!r}" if token in special else str(token) for token in ids)

    sources = "; ".join(f"{name} {shown(ids)}" for name, ids in named.items())
    rest = tuple(token for token in every if token not in ends)
    left = f", not at {shown(rest)}, which is no special token" if rest else ""
    return EndTokens(ends, f"the model's files name different end tokens ({sources}); samples end at {shown(ends)}{left}")


def _refused(key: str, defaults: Mapping[str, Any], taken: Collection[str]) -> bool:
    """Return whether an end token is not an id, `do_sample` is neither true nor false, or a sampling default was left out
    because a job would be refused with it."""
    if key == "eos_token_id":
        return not all(map(_is_id, _listed(defaults[key])))
    if key == "do_sample":
        return not isinstance(defaults[key], bool)
    if key not in GenerationConfig.model_fields or key in taken:
        return False
    return key in GREEDY_TOO or defaults.get("do_sample") is not False


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object. Fetch the model again.")
    return cast("dict[str, Any]", value)


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(filter(_is_id, _listed(value))))


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _listed(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]
