"""Samples with penalties and biases, through the whole engine in float64: the tokens of a naive loop over transformers' model
and processors, however the samples are scheduled and whatever happens to the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_engine, tiny_models, token_device
from support.sampling import sampler_inputs
from support.tiny_engine import EOS, HEADER, VOCAB
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tokabatch.model.families import family_names
from tokabatch.model.sampling.sampler import sample
from tokabatch.scheduling.contracts import Completion, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

MOST = 12
PROMPTS = [[*HEADER, 1], [*HEADER, 50, 51, 52, 53], [*HEADER, 50, 51, 52, 70], [*HEADER[:7], 20, 21], [88], HEADER]
TWO = {"n": 2, "max_tokens": MOST}
KINDS = [
    SamplingParams(**TWO, temperature=0.0, repetition_penalty=1.3, min_tokens=8),
    SamplingParams(**TWO, temperature=0.0),
    SamplingParams(**TWO, temperature=0.9, presence_penalty=1.2, frequency_penalty=0.7, seed=3),
    SamplingParams(**TWO, temperature=0.0, logit_bias=((40, 9.0), (7, 2.5)), bad_words=((40, 40), (7,)), frequency_penalty=1.5),
    SamplingParams(**TWO, temperature=0.7, top_p=0.9, repetition_penalty=1.1, min_tokens=5, logit_bias=((EOS, 8.0),)),
    SamplingParams(**TWO, temperature=0.0, bad_words=((12, 8), (4,), (23, 5, 5)), presence_penalty=-1.0),
]
"""Of the prompts, one each."""
LONGEST = max(map(len, PROMPTS)) + MOST


class OutputPenalties(LogitsProcessor):
    """Presence and frequency penalties, which transformers has not, as vLLM has them."""

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self.params, self.prompt_length = params, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=VOCAB).to(scores.dtype)
        scores = scores - self.params.frequency_penalty * counts
        return scores - self.params.presence_penalty * (counts > 0).to(scores.dtype)


def processors(params: SamplingParams, prompt_length: int) -> LogitsProcessorList:
    """In transformers' order."""
    made = LogitsProcessorList()
    if params.logit_bias:
        made.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    made.append(OutputPenalties(params, prompt_length))
    if params.bad_words:
        made.append(NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if params.min_tokens:
        made.append(MinNewTokensLengthLogitsProcessor(prompt_length, params.min_tokens, [EOS]))
    return made


def naive(model: PreTrainedModel, row: int, number: int) -> list[int]:
    """One sample by a loop that recomputes everything for every token; our sampler draws if sampling is random."""
    prompt, params = PROMPTS[row], KINDS[row]
    changed, tokens = processors(params, len(prompt)), list(prompt)
    for _ in range(params.max_tokens):
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            scores = changed(ids, model(ids).logits[:, -1])
        given = sampler_inputs(number + 1, params.temperature, params.top_k, params.top_p, row=row, seed=params.seed)
        slot = torch.tensor([number])
        given = replace(given, slot_S=slot, position_S=torch.tensor([len(tokens)]))
        tokens.append(int(sample(scores, given).token_S[0]))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_models.build(family, root / family) for family in family_names()}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, dict[tuple[int, int], list[int]]]:
    """The tokens of each family's samples."""
    found: dict[str, dict[tuple[int, int], list[int]]] = {}
    for family, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        found[family] = {(row, number): naive(model, row, number) for row in range(len(PROMPTS)) for number in range(2)}
    return found


def generate(
    folder: Path, limits: SchedulerLimits, depth: int, losses: Sequence[int] = (), given_later: int = 0
) -> dict[tuple[int, int], Completion]:
    """The samples of all prompts; see `tiny_engine.generate`."""
    requests = token_device.make_requests(PROMPTS, KINDS)
    requests = replace(requests, params=requests.row_index.astype(np.int32))
    spec = tiny_engine.worker_spec(folder, limits, KINDS)
    return tiny_engine.generate(spec, requests, limits, depth, losses=losses, given_later=given_later)[0]


@pytest.mark.parametrize("family", family_names())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tiny_engine.schedules(LONGEST), st.lists(st.integers(1, 30), max_size=2), st.integers(0, 3))
def test_tokens_equal_the_naive_loop(
    family: str, folders: Any, wanted: Any, schedule: tuple[SchedulerLimits, int], losses: list[int], given_later: int
) -> None:
    limits, depth = schedule
    done = generate(folders[family], limits, depth, losses, given_later)
    assert {key: completion.token_ids.tolist() for key, completion in done.items()} == wanted[family]


def test_every_penalty_shows(folders: Any, wanted: Any) -> None:
    """Without them the tokens of every prompt but the one that has none are others."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float64)
    plain = dict.fromkeys(("repetition_penalty",), 1.0) | dict.fromkeys(("presence_penalty", "frequency_penalty"), 0.0)
    for row, params in enumerate(KINDS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "KINDS", list(KINDS))
            KINDS[row] = replace(params, **plain, min_tokens=0, logit_bias=(), bad_words=())
            assert (naive(model, row, 0) == wanted["llama"][row, 0]) == (not params.penalised), row


@pytest.mark.parametrize("row", [0, 3, 5])
def test_tokens_equal_those_of_generate(folders: Any, row: int) -> None:
    """transformers' own loop puts the same processors together, in float32."""
    limits = SchedulerLimits(4, 100, 8, 40, -(-LONGEST // 4), GroupingLimits(2, 1))
    prompt, params = PROMPTS[row], KINDS[row]
    given: dict[str, Any] = {}
    if params.bad_words:
        given["bad_words_ids"] = [list(word) for word in params.bad_words]
    if params.logit_bias:
        given["sequence_bias"] = [[[token], bias] for token, bias in params.logit_bias]
    for folder in folders.values():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        tokens = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=MOST,
            eos_token_id=EOS,
            pad_token_id=0,
            repetition_penalty=params.repetition_penalty,
            min_new_tokens=params.min_tokens,
            logits_processor=LogitsProcessorList([OutputPenalties(params, len(prompt))]),
            **given,
        )[0, len(prompt) :]
        done = generate(folder, limits, 2)
        assert done[row, 1].token_ids.tolist() == tokens.tolist()


def test_logprobs_are_those_of_the_unchanged_logits(folders: Any) -> None:
    limits = SchedulerLimits(4, 100, 8, 40, -(-LONGEST // 4), GroupingLimits(2, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "KINDS", [replace(params, logprobs=2) for params in KINDS])
        done = generate(folders["qwen2"], limits, 2)
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float64)
    for (row, _), completion in done.items():
        tokens = torch.tensor([PROMPTS[row] + completion.token_ids.tolist()])
        with torch.inference_mode():
            logprobs = model(tokens).logits[0, len(PROMPTS[row]) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
        assert completion.logprobs is not None and completion.top_ids is not None
        torch.testing.assert_close(torch.from_numpy(completion.logprobs).double(), chosen, rtol=0, atol=1e-4)
        assert torch.equal(torch.from_numpy(completion.top_ids).long(), logprobs.topk(2).indices)
