"""Given texts, through the whole engine in float64: their log-probabilities are transformers', however they are scheduled and
whatever happens to the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_engine, tiny_models, token_device
from support.double_precision import load_double
from support.tiny_engine import EOS, HEADER

from tokabatch.engine.executor import InProcessExecutor
from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.model.families import family_names
from tokabatch.scheduling.contracts import Completion, Continuations, Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

ROWS: list[tuple[list[int], list[list[int]]]] = [
    ([*HEADER, 1], [[7], [8], [9, EOS], [9, 10, 11, 12, 13, 14]]),
    ([*HEADER, 50, 51, 52, 53], [[EOS, 5, 5], [54, 55, 56], [54, 55, 57]]),
    ([*HEADER, 50, 51, 52, 70], [[3]]),
    ([*HEADER[:7], 20, 21], [[60] * 15, [12]]),
    ([88], [[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [88]]),
    (HEADER, [[1, 7]]),
]
"""Prompts with the texts that are scored behind each."""
LONGEST = max(len(prompt) + max(map(len, texts)) for prompt, texts in ROWS)
PARAMS = [SamplingParams(n=len(texts), max_tokens=max(map(len, texts)), ignore_eos=True, logprobs=0) for _, texts in ROWS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_models.build(family, root / family) for family in family_names()}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, dict[tuple[int, int], tuple[np.ndarray, bool]]]:
    """The logprob of each token of every text, and whether greedy decoding would have written it."""
    found: dict[str, dict[tuple[int, int], tuple[np.ndarray, bool]]] = {}
    for family, folder in folders.items():
        model = load_double(folder)
        found[family] = {}
        for row, (prompt, texts) in enumerate(ROWS):
            for number, text in enumerate(texts):
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
                target = torch.tensor(text)
                logprobs = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
                found[family][row, number] = logprobs.numpy(), bool((logits.argmax(-1) == target).all())
    return found


def make_requests(rows: Sequence[tuple[list[int], list[list[int]]]]) -> Any:
    requests = token_device.make_requests([prompt for prompt, _ in rows], PARAMS)
    texts = [text for _, texts in rows for text in texts]
    counts = [len(texts) for _, texts in rows]
    given = Continuations(
        first=(np.cumsum(counts) - counts).astype(np.int64),
        start=np.append(0, np.cumsum([len(text) for text in texts])).astype(np.int64),
        tokens=np.array([token for text in texts for token in text], np.int32),
    )
    return replace(requests, params=requests.row_index.astype(np.int32), continuations=given)


def score(
    folder: Path, limits: SchedulerLimits, depth: int, losses: Sequence[int] = (), given_later: int = 0, worker: Any = None
) -> dict[tuple[int, int], Completion]:
    """All texts; see `tiny_engine.generate`. `worker` takes the place of the executor's own."""
    make = InProcessExecutor if worker is None else partial(InProcessExecutor, build=worker)
    spec, requests = tiny_engine.worker_spec(folder, limits), make_requests(ROWS)
    done, scheduler = tiny_engine.generate(spec, requests, limits, depth, make, losses=losses, given_later=given_later)
    if not losses and not any(completion.error_code for completion in done.values()):
        assert scheduler.counts.output_tokens == sum(len(text) for _, texts in ROWS for text in texts)
    return done


def assert_right(done: dict[tuple[int, int], Completion], wanted: dict[tuple[int, int], tuple[np.ndarray, bool]]) -> None:
    assert done.keys() == wanted.keys()
    for (row, number), completion in done.items():
        logprobs, greedy = wanted[row, number]
        assert completion.token_ids.tolist() == ROWS[row][1][number]
        assert (completion.finish_reason, completion.stop_reason, completion.error_code) == ("scored", None, None)
        assert completion.score is not None and completion.logprobs is not None
        assert abs(completion.score.logprob - logprobs.sum()) < 1e-9 and completion.score.greedy == greedy
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-6)


@pytest.mark.parametrize("family", family_names())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tiny_engine.schedules(LONGEST), st.lists(st.integers(1, 20), max_size=2), st.integers(0, 3))
def test_scores_are_those_of_transformers(
    family: str, folders: Any, wanted: Any, schedule: tuple[SchedulerLimits, int], losses: list[int], given_later: int
) -> None:
    limits, depth = schedule
    assert_right(score(folders[family], limits, depth, losses, given_later), wanted[family])


def test_what_texts_share_is_computed_once(folders: Any, wanted: Any) -> None:
    """The prompts' tokens once, page for page, and of each text but a prompt's first its tokens and the one before them."""
    computed = []

    class Counting(Worker):
        @classmethod
        def build(cls, spec: WorkerSpec) -> Any:
            return Launching(Worker.build(spec))

    class Launching:
        def __init__(self, worker: Worker) -> None:
            self.worker, self.sizes = worker, worker.sizes

        def launch(self, step: Any) -> Any:
            computed.append(step.num_tokens)
            return self.worker.launch(step)

        def make_ahead(self) -> None: ...

        def close(self) -> None: ...

    limits = SchedulerLimits(1, 400, 64, 256, LONGEST, GroupingLimits(2, 1))
    done = score(folders["llama"], limits, 1, worker=Counting.build)
    assert_right(done, wanted["llama"])
    whole = [prompt + text for prompt, texts in ROWS for text in texts]
    tokens = {tuple(each[: place + 1]) for each in whole for place in range(len(each) - 1)}
    # A prompt's last token is computed for each of its texts.
    assert sum(computed) <= len(tokens) + sum(len(texts) for _, texts in ROWS) + 10


@pytest.mark.parametrize(("max_running", "depth", "page_size"), [(1, 1, 4), (3, 3, 4), (12, 2, 16)])
@pytest.mark.parametrize(("token", "spoilt"), [(53, {(1, 0), (1, 1), (1, 2)}), (10, {(0, 3), (4, 0)}), (54, {(1, 1), (1, 2)})])
def test_a_token_that_breaks_the_model_costs_those_texts_alone_that_read_it(
    folders: Any, wanted: Any, max_running: int, depth: int, page_size: int, token: int, spoilt: set[tuple[int, int]]
) -> None:
    class Spoilt:
        @classmethod
        def build(cls, spec: WorkerSpec) -> Any:
            worker = Worker.build(spec)
            worker._decoder._weights.embed_VE[token] = float("nan")
            worker.make_ahead, worker.close = lambda: None, lambda: None
            return worker

    limits = SchedulerLimits(page_size, 40, max_running, 40, -(-LONGEST // page_size), GroupingLimits(2, 1))
    done = score(folders["qwen2"], limits, depth, worker=Spoilt.build)
    broken = {key: completion.error_code for key, completion in done.items() if completion.error_code}
    assert broken == dict.fromkeys(spoilt, "nan_logits")
    rest = {key: completion for key, completion in done.items() if key not in broken}
    assert_right(rest, {key: value for key, value in wanted["qwen2"].items() if key not in broken})


def test_texts_are_scored_beside_what_is_drawn(folders, wanted):
    """Whole prompts with log-probabilities, alternatives and none, some of them continued, among samples that are drawn;
    workers are lost, and pages are short. Scores are transformers', and what is drawn is drawn without them, too."""
    folder = folders[family_names()[0]]
    model = load_double(folder)
    texts = [prompt + continuation for prompt, continuations in ROWS for continuation in continuations]
    lengths = np.array([len(text) for text in texts], np.int32)
    drawn = SamplingParams(max_tokens=6, temperature=0.8, seed=3, logprobs=2)
    sampling, params, given = [drawn], list[int](), list[int]()
    for row, text in enumerate(texts):
        count = 0 if row % 3 == 2 else len(text) - 1
        if count:
            more = row % 2
            sampling.append(SamplingParams(max_tokens=count + more, ignore_eos=True, temperature=0.0, logprobs=row % 4))
        params.append(len(sampling) - 1 if count else 0)
        given.append(count)
    requests = Requests(
        row_index=np.arange(len(texts)),
        tokens=np.concatenate([np.array(text, np.int32) for text in texts]),
        start=(np.cumsum(lengths) - lengths).astype(np.int64),
        length=lengths - np.array(given, np.int32),
        lcp=np.zeros(len(texts), np.int32),
        params=np.array(params, np.int32),
        sampling=tuple(sampling),
        given=np.array(given, np.int32),
    )
    plain = requests.take(np.flatnonzero(requests.given == 0))
    assert plain.given is not None and not plain.given.any()
    for losses, pages, running in (((), 64, 8), ((2, 5), 40, 3)):
        limits = SchedulerLimits(4, pages, running, running + 9, 16, GroupingLimits(2, 1))
        spec = tiny_engine.worker_spec(folder, limits)
        done, _ = tiny_engine.generate(spec, requests, limits, 2, losses=losses)
        alone, _ = tiny_engine.generate(spec, plain, limits, 1)
        assert len(done) == len(texts)
        for row, text in enumerate(texts):
            completion, count = done[row, 0], given[row]
            assert completion.error_code is None
            if not count:
                assert completion.token_ids.tolist() == alone[row, 0].token_ids.tolist()
                continue
            with torch.inference_mode():
                logits = model(torch.tensor([text])).logits[0].log_softmax(-1)
            expected = logits[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
            np.testing.assert_allclose(completion.logprobs[:count], expected.numpy(), rtol=1e-6)
            more = [] if row % 2 == 0 else [int(logits[-1].argmax())]
            assert completion.token_ids.tolist() == text[1:] + more
            if row % 4:
                top, ids = logits[: count + len(more)].topk(row % 4)
                assert completion.top_ids.tolist() == ids.tolist()
                np.testing.assert_allclose(completion.top_logprobs, top.numpy(), rtol=1e-6)
