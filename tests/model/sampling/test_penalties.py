"""Changed logits against transformers' processors, bit for bit in float64, whatever else is in the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.sampling import sampler_inputs
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tokabatch.attention.upload import Outbox
from tokabatch.model.sampling import penalties
from tokabatch.model.sampling.penalties import Penalties
from tokabatch.model.sampling.sampler import sample
from tokabatch.scheduling.contracts import SamplingParams, SlotInit, StepBatch
from tokabatch.scheduling.penalty_rules import PenaltyTable

VOCAB, PAGE, COLUMNS, STOPS = 61, 4, 8, (2, 5)
NONE = np.zeros(0, np.int32)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.6},
    {"frequency_penalty": -0.4, "presence_penalty": 0.2},
    {"min_tokens": 9},
    {"logit_bias": ((7, 0.3), (2, -4.0), (60, 100.0))},
    {"bad_words": ((3,), (9, 9), (4, 9, 11))},
    {
        "repetition_penalty": 1.1,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.25,
        "min_tokens": 6,
        "logit_bias": ((5, 3.0), (11, 1.5)),
        "bad_words": ((11,), (9, 12)),
    },
]


def expected(params: SamplingParams, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """transformers' processors in its order; presence and frequency, which it has not, as vLLM has them."""
    ids, scores = torch.tensor([[*prompt, *output]]), logits[None]
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias})(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB).to(logits.dtype)
    scores = scores - params.frequency_penalty * counts
    scores = scores - params.presence_penalty * (counts > 0).to(logits.dtype)
    masks = LogitsProcessorList()
    if params.bad_words:
        masks.append(NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if params.min_tokens:
        masks.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(STOPS)))
    return masks(ids, scores)[0]


def step(slots: list[int], starts: list[int], tokens: list[list[int]], table: np.ndarray, inits: SlotInit, **changes: Any):
    """Each slot computes these tokens from this position on; the page table is told again each time."""
    cells = np.indices((len(slots), COLUMNS)).reshape(2, -1)
    fields: dict[str, Any] = {
        "index": 1,
        "inits": inits,
        "table_slot": np.array(slots, np.int32)[cells[0]],
        "table_column": cells[1].astype(np.int32),
        "table_page": table[slots].reshape(-1).astype(np.int32),
        "clear_pages": NONE,
        "copy_src": NONE,
        "copy_dst": NONE,
        "num_prefill_runs": len(slots),
        "run_slot": np.array(slots, np.int32),
        "run_start": np.array(starts, np.int32),
        "run_length": np.array([len(each) for each in tokens], np.int32),
        "run_samples": np.ones(len(slots), np.bool_),
        "run_skip": np.zeros(len(slots), np.int32),
        "token_ids": np.array([token for each in tokens for token in each], np.int32),
        "prefix_levels": (),
    }
    return StepBatch(**(fields | changes))


def inits_of(slots: list[int], kinds: list[SamplingParams], prompts: list[list[int]], temperature: float = 0.0) -> SlotInit:
    count = len(slots)
    zero, one = np.zeros(count, np.int32), np.ones(count, np.float32)
    table = PenaltyTable(lambda entry: STOPS)
    table.extend(kinds)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    found = table.of(np.array(slots), np.arange(count, dtype=np.int32), lengths)
    init = SlotInit(
        np.array(slots, np.int32), zero.astype(np.int64), zero, zero.astype(np.int64), one * 0, one, zero, one * 0, zero - 1
    )
    return replace(init, temperature=one * np.float32(temperature), penalties=found)


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    """From few tokens, so that many are repeated and bad words are begun."""
    return rng.choice([2, 3, 4, 5, 9, 11, 12, 40, 60], count).tolist()


def opened(rng: np.random.Generator, num_slots: int = 18, device: str = "cpu"):
    """A table of slots of every kind whose prompts and outputs are computed; kinds, prompts and outputs."""
    kinds = [SamplingParams(**KINDS[i % len(KINDS)]) for i in range(num_slots)]
    prompts = [random_tokens(rng, int(rng.integers(1, 15))) for _ in kinds]
    outputs = [random_tokens(rng, int(rng.integers(0, 14))) for _ in kinds]
    pages = np.arange(num_slots * COLUMNS).reshape(num_slots, COLUMNS)
    state = Penalties(num_slots, COLUMNS, pages.size, PAGE, VOCAB, torch.device(device))
    contexts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    slots = list(range(num_slots))
    outbox = Outbox(torch.device(device))
    inits = inits_of(slots, kinds, prompts)
    last = torch.zeros(num_slots, dtype=torch.int64, device=device)
    state.follow(step(slots, [0] * num_slots, contexts, pages, inits), last, outbox)
    outbox.send()
    return state, kinds, prompts, outputs


def changed(
    state: Penalties, slots: list[int], positions: list[int], logits: torch.Tensor, device: str = "cpu"
) -> dict[int, torch.Tensor]:
    """The changed logits of the penalised slots among these."""
    outbox, logits = Outbox(torch.device(device)), logits.to(device)
    rows = state.rows(np.array(slots, np.int32), np.array(positions, np.int32), outbox)
    outbox.send()
    found: dict[int, torch.Tensor] = {}
    for block in rows.blocks(VOCAB) if rows else ():
        each = block.rows.table.apply(logits.index_select(0, block.row_B), block)
        found |= {int(slot): values.cpu() for slot, values in zip(block.slot_B, each, strict=True)}
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_logits_are_changed_as_transformers_does(device, seed, rows_at_once, monkeypatch):
    monkeypatch.setattr(penalties, "_BLOCK_CPU", rows_at_once * 4 * 40)
    monkeypatch.setattr(penalties, "_BLOCK_DEVICE", rows_at_once * 4 * 40)
    rng = np.random.default_rng(seed)
    state, kinds, prompts, outputs = opened(rng, device=device)
    logits = torch.randn(len(kinds), VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, 8] = -torch.inf
    positions = [len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True)]
    order = rng.permutation(len(kinds)).tolist()
    found = changed(state, order, [positions[slot] for slot in order], logits[order], device)
    assert sorted(found) == [slot for slot, params in enumerate(kinds) if params.penalised]
    for slot, values in found.items():
        wanted = expected(kinds[slot], prompts[slot], outputs[slot], logits[slot])
        assert torch.equal(values, wanted), (slot, kinds[slot])


def test_drawn_tokens_pages_copied_and_slots_opened_again_are_followed():
    rng = np.random.default_rng(3)
    prompt = random_tokens(rng, 6)
    params = SamplingParams(**KINDS[8])
    state = Penalties(2, COLUMNS, 40, PAGE, VOCAB, torch.device("cpu"))
    last = torch.zeros(2, dtype=torch.int64)
    pages = np.stack((np.arange(COLUMNS), np.arange(COLUMNS) + 20))

    def follow(given: StepBatch) -> None:
        outbox = Outbox(torch.device("cpu"))
        state.follow(given, last, outbox)
        outbox.send()

    follow(step([0], [0], [prompt], pages, inits_of([0], [params], [prompt])))
    outputs: list[list[int]] = [[], []]
    logits = torch.randn(2, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def check(slots: list[int]) -> None:
        found = changed(state, slots, [6 + len(outputs[slot]) for slot in slots], logits[slots])
        for slot in slots:
            assert torch.equal(found[slot], expected(params, prompt, outputs[slot], logits[slot]))

    check([0])
    # Slot 1 shares the first page of the prompt and has a copy of the second.
    pages[1, 0] = pages[0, 0]
    fork = {"copy_src": pages[0, 1:2].astype(np.int32), "copy_dst": pages[1, 1:2].astype(np.int32)}
    follow(step([], [], [], pages, inits_of([], [], [])))
    both = step([0, 1], [0, 0], [[], []], pages, inits_of([1], [params], [prompt]), **fork)
    follow(replace(both, run_slot=NONE, run_start=NONE, run_length=NONE, run_samples=NONE.astype(bool), run_skip=NONE))
    check([1, 0])
    for turn in range(9):
        for slot in (0, 1):
            last[slot] = random_tokens(rng, 1)[0]
            outputs[slot].append(int(last[slot]))
        decode = step([0, 1], [6 + turn] * 2, [[0], [0]], pages, inits_of([], [], []))
        follow(replace(decode, num_prefill_runs=0, token_ids=NONE))
        check([0, 1])
    # Without penalties now, then again with others.
    follow(step([1], [0], [prompt], pages, inits_of([1], [SamplingParams()], [prompt])))
    assert 1 not in changed(state, [0, 1], [15, 6], logits)
    params, outputs[1] = SamplingParams(repetition_penalty=2.0), []
    follow(step([1], [0], [prompt], pages, inits_of([1], [params], [prompt])))
    check([1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_without_penalties_draw_as_ever_and_logprobs_are_the_models(dtype, temperature):
    state, kinds, prompts, outputs = opened(np.random.default_rng(5))
    count = len(kinds)
    logits = (torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    inputs = sampler_inputs(count, temperature=temperature, logprobs=[2, 0, -1] * (count // 3), top_k=[0, 9] * (count // 2))
    outbox = Outbox(torch.device("cpu"))
    positions = np.array([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)], np.int32)
    rows = state.rows(np.arange(count, dtype=np.int32), positions, outbox)
    outbox.send()
    inputs = replace(inputs, position_S=torch.from_numpy(positions))
    last = torch.full((count,), -1)
    together, plain = sample(logits, inputs, last, rows), sample(logits, inputs)
    assert torch.equal(last, together.token_S.long())
    logprobs = logits.double().log_softmax(-1) if dtype == torch.float64 else logits.float().log_softmax(-1)
    torch.testing.assert_close(together.top_logprobs_SK, plain.top_logprobs_SK)
    assert torch.equal(together.top_ids_SK, plain.top_ids_SK)
    differs = 0
    for row, params in enumerate(kinds):
        if not params.penalised:
            assert together.token_S[row] == plain.token_S[row]
        else:
            wide = logits[row].double() if dtype == torch.float64 else logits[row].float()
            alone = expected(params, prompts[row], outputs[row], wide)[None].to(wide.dtype)
            one = replace(inputs, slot_S=inputs.slot_S[row : row + 1], position_S=inputs.position_S[row : row + 1])
            assert together.token_S[row] == sample(alone, one).token_S[0]
            differs += int(together.token_S[row] != plain.token_S[row])
        if row % 3 < 2:
            chosen = logprobs[row, int(together.token_S[row])].float()
            torch.testing.assert_close(together.logprob_S[row], chosen)
        else:
            assert together.logprob_S[row].isnan()
    assert differs > 3
