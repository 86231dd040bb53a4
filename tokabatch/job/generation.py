"""The section `generation`: its keys, merged with a row's own settings and with defaults from the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator, with_config
from typing_extensions import TypedDict

from tokabatch.errors import RowError
from tokabatch.job import fields
from tokabatch.job.keys import Section
from tokabatch.job.refusals import row_message
from tokabatch.job.scalars import write_value
from tokabatch.scheduling.contracts import SamplingParams


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting; `source` is `job`, `generation_config.json` or `default`."""

    key: str
    value: str
    source: str


class GenerationConfig(Section):
    """How samples are drawn. A row may override any of these with a struct in its column sampling_params. A key that
    is null has its default; in a row, the job's value."""

    n: fields.Samples = Field(default=1, description="Samples per row.")
    temperature: fields.Temperature = Field(
        default=1.0, description="Randomness of the samples; 0 always picks the most likely token."
    )
    top_p: fields.TopP = Field(
        default=1.0, description="Keep the most likely tokens whose probabilities add up to this; 1: all."
    )
    top_k: fields.OptionalTopK = Field(default=None, description="Keep only the k most likely tokens.")
    min_p: fields.MinP = Field(default=0.0, description="Drop tokens below this fraction of the most likely one's probability.")
    max_tokens: fields.MostTokens = Field(default=256, description="Maximum length of a sample, in tokens; null: 256.")
    stop: fields.Texts = Field(default=(), description="Texts that end a sample.")
    stop_token_ids: fields.TokenIds = Field(default=(), description="Token ids that end a sample, besides the model's own.")
    ignore_eos: fields.Flag = Field(default=False, description="Do not end at the model's end-of-sequence tokens.")
    seed: fields.Seed = Field(
        default=0, description="Random seed. A sample depends only on the seed, its row and its sample number."
    )
    logprobs: fields.OptionalLogprobs = Field(
        default=None,
        description="Log-probabilities: 0 for the sampled tokens, k to add the k most likely. For given texts use mode: score.",
    )
    repetition_penalty: fields.Repetition = Field(
        default=1.0, description="Divide the logits of tokens already in the prompt or output (multiply negative ones)."
    )
    presence_penalty: fields.Penalty = Field(default=0.0, description="Subtract this from the logits of tokens in the output.")
    frequency_penalty: fields.Penalty = Field(
        default=0.0, description="Subtract this from a token's logit for each of its occurrences in the output."
    )
    min_tokens: fields.LeastTokens = Field(
        default=0, description="Minimum length of a sample, in tokens, before anything ends it."
    )
    logit_bias: fields.LogitBias = Field(default={}, description="Values added to the logits of tokens, by token id.")
    bad_words: fields.BadWords = Field(
        default=(), description="Texts (also after a space) or lists of token ids that no sample may contain."
    )

    @model_validator(mode="after")
    def _least_below_most(self) -> GenerationConfig:
        if self.max_tokens != "context" and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, but max_tokens is {self.max_tokens}; lower min_tokens or raise max_tokens"
            )
        return self

    @cached_property
    def param_values(self) -> dict[str, Any]:
        """The fields of `params`."""
        return _as_params({name: getattr(self, name) for name in SETTINGS})

    def params(self) -> SamplingParams:
        """Return the same settings as SamplingParams; `bad_words` must hold token ids only."""
        return SamplingParams(**self.param_values)

    def row_params(self, struct: Mapping[str, Any]) -> SamplingParams | RowError:
        """Merge one row's settings over these; a null in the row takes the job's value, since Parquet structs have a null for
        each key without a value. Returns an error `bad_sampling` for unknown settings and values that are not accepted."""
        given = {name: value for name, value in struct.items() if value is not None}
        try:
            own = _ROW_SETTINGS.validate_python(given)
            least, most = own.get("min_tokens", self.min_tokens), own.get("max_tokens", self.max_tokens)
            if most != "context" and least > most:
                GenerationConfig.model_validate({"min_tokens": least, "max_tokens": most})
        except ValidationError as error:
            merged = {name: getattr(self, name) for name in SETTINGS} | given
            return RowError("bad_sampling", row_message(GenerationConfig, error, merged))
        return SamplingParams(**self.param_values | _as_params(own))

    def with_model_defaults(self, defaults: Mapping[str, Any]) -> tuple[GenerationConfig, tuple[Setting, ...]]:
        """Fill in what the job leaves open from `defaults`, values of a model's generation_config.json under keys of this
        section; return the result and where each value came from. Nulls and values that a job could not have are left out."""
        taken: dict[str, Any] = {}
        for name, value in defaults.items():
            if name in self.model_fields_set or value is None:
                continue
            try:
                GenerationConfig.model_validate({name: value})
            except ValidationError:
                continue
            taken[name] = value
        merged = {name: getattr(self, name) for name in self.model_fields_set} | taken
        effective = GenerationConfig.model_validate(merged)
        settings: list[Setting] = []
        for name in SETTINGS:
            source = "generation_config.json" if name in taken else "job" if name in merged else "default"
            settings.append(Setting(name, write_value(getattr(effective, name)), source))
        return effective, tuple(settings)


SETTINGS = tuple(GenerationConfig.model_fields)  # Pydantic rebuilds the table at each access.
_HINTS = get_type_hints(GenerationConfig, include_extras=True)
_RowSettings = TypedDict("_RowSettings", {name: _HINTS[name] for name in SETTINGS}, total=False)  # pyright: ignore
_ROW_SETTINGS: TypeAdapter[Any] = TypeAdapter(with_config(ConfigDict(strict=True, extra="forbid"))(_RowSettings))
"""Validates only the settings given, in a third of the time that validating all of them takes."""


def _as_params(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert settings to fields of SamplingParams, where 0 means no `top_k`, and `max_tokens: context` until a prompt is
    given."""
    values = dict(settings)
    if "top_k" in values:
        values["top_k"] = values["top_k"] or 0
    if values.get("max_tokens") == "context":
        values["max_tokens"] = 0
    if "logit_bias" in values:
        values["logit_bias"] = tuple(sorted(values["logit_bias"].items()))
    assert not any(isinstance(word, str) for word in values.get("bad_words", ())), "texts are encoded first"
    return values
