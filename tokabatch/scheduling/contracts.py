"""The types that packages exchange: one for each interface, frozen, with NumPy arrays where there are many entries.

This module depends on no torch, tokenizer or file format. `input` produces `Requests`, `scheduling` produces `StepBatch` and
`Completion`, and `engine` returns a `StepResult` for each `StepBatch`.

Shape legend: R requests (prompts), T tokens of a step, Q runs of a step, S sampled runs of a step, A slots opened by a step,
U page-table cells changed by a step, C pages copied by a step, G groups of one prefix level, K most likely tokens reported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Generic, Literal, TypeVar

import numpy as np

from tokabatch.arrays import Bool, Float32, Float64, Int32, Int64

FinishReason = Literal["stop", "length", "scored"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of one row. `temperature` 0 is greedy; `top_k` 0 is off; `logprobs` None reports no
    log-probabilities, 0 the chosen token's, k those of the k most likely tokens too. `max_tokens` is at least 1; only before
    the prompt is known, it may be 0, which means what the prompt leaves of the model's context."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each with the bias added to its logit."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids that no sample may contain."""

    @property
    def has_given_length(self) -> bool:
        """Whether only `max_tokens` can end a sample."""
        return self.ignore_eos and not self.stop and not self.stop_token_ids

    @property
    def penalised(self) -> bool:
        """Whether logits are modified before a token is drawn from them."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or self.min_tokens > 0 or bool(self.logit_bias) or bool(self.bad_words)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples that are drawn already, one flag for each sample of the whole job: sample s of row r is at `start[r] + s`.
    `start` has shape [rows + 1]."""

    start: Int64
    flags: Bool

    def counts(self) -> Int64:
        """Return the number of drawn samples of each row, shape [rows]."""
        return np.add.reduceat(self.flags, self.start[:-1], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Continuations:
    """Given texts that are scored (log-probabilities) in place of drawing samples: the text of sample s of row r is number
    `first[r] + s`, and text c has the tokens `tokens[start[c] : start[c + 1]]`, at least one."""

    first: Int64
    start: Int64
    tokens: Int32

    def of(self, row: int, sample: int) -> Int32:
        """Return the token ids of one text."""
        number = int(self.first[row]) + sample
        return self.tokens[int(self.start[number]) : int(self.start[number + 1])]


@dataclass(frozen=True, slots=True)
class Requests:
    """The prompts of a run in plan order, a table of arrays. `tokens` may be memory-mapped and is never copied whole.

    Prompt r is `tokens[start[r] : start[r] + length[r]]`. `lcp[r]` counts the leading tokens that prompt r shares with
    prompt r - 1 of the same order (`lcp[0]` is 0). `params[r]` indexes `sampling`. `drawn` is None if nothing is drawn yet;
    every prompt has at least one sample to draw. `span` narrows each prompt's samples to those from its first number up to its
    second (exclusive; shape [R] each); None means all of them.
    """

    row_index: Int64
    tokens: Int32
    start: Int64
    length: Int32
    lcp: Int32
    params: Int32
    sampling: tuple[SamplingParams, ...]
    drawn: Drawn | None = None
    span: tuple[Int32, Int32] | None = None
    continuations: Continuations | None = None
    """The texts to score in place of samples, if any; the parameters' `n` and `max_tokens` are then the number of texts and the
    number of tokens of the longest."""
    key: Int64 | None = None
    """The row number that seeds the random numbers, shape [R]; None means `row_index`."""
    given: Int32 | None = None
    """The number of tokens that directly follow each prompt in `tokens` and are scored before one is drawn, shape [R]; None
    means 0 for all. They count as tokens of the sample, the only one of such a prompt: `max_tokens` is their number plus the
    number of tokens to draw, which may be 0."""

    def __len__(self) -> int:
        return len(self.row_index)

    def samples(self, request: int) -> Int32:
        """Return the numbers of the samples to draw from one prompt, ascending."""
        first, stop = 0, self.sampling[int(self.params[request])].n
        if self.span is not None:
            first, stop = int(self.span[0][request]), min(stop, int(self.span[1][request]))
        if self.drawn is None:
            return np.arange(first, stop, dtype=np.int32)
        begin = int(self.drawn.start[self.row_index[request]])
        return (np.flatnonzero(~self.drawn.flags[begin + first : begin + stop]) + first).astype(np.int32)

    def num_samples(self) -> Int64:
        """Return how many samples are to be drawn from each prompt, shape [R]."""
        wanted = np.array([params.n for params in self.sampling], np.int64)[self.params]
        if self.span is None:
            return wanted if self.drawn is None else wanted - self.drawn.counts()[self.row_index]
        if self.drawn is None:
            return (np.minimum(self.span[1], wanted) - self.span[0]).astype(np.int64)
        return np.array([len(self.samples(request)) for request in range(len(self))], np.int64)

    def without(self, drawn: Drawn) -> Requests:
        """Return the prompts with samples left to draw, given the samples that are `drawn` already."""
        left = replace(self, drawn=drawn)
        return left.take(np.flatnonzero(left.num_samples()))

    def take(self, requests: Int32 | Int64) -> Requests:
        """Return only these prompts, given in ascending order."""
        # The common prefix of two prompts that are kept is the shortest of those in between.
        lcp = np.zeros(0, self.lcp.dtype)
        if len(requests):
            lcp = np.minimum.reduceat(self.lcp[: requests[-1] + 1], np.append(0, requests[:-1] + 1))
        lcp[:1] = 0
        return replace(
            self,
            row_index=self.row_index[requests],
            start=self.start[requests],
            length=self.length[requests],
            lcp=lcp,
            params=self.params[requests],
            span=None if self.span is None else (self.span[0][requests], self.span[1][requests]),
            key=None if self.key is None else self.key[requests],
            given=None if self.given is None else self.given[requests],
        )

    def part(self, requests: Int32, first: Int32, stop: Int32) -> Requests:
        """Return samples `first[i]` to `stop[i] - 1` of each prompt `requests[i]`, ascending. A prompt may occur several times,
        for separate ranges of samples."""
        distinct, place = np.unique(requests, return_inverse=True)
        taken = self.take(distinct)
        again = np.diff(requests, prepend=-1) == 0
        return replace(
            taken,
            row_index=taken.row_index[place],
            start=taken.start[place],
            length=taken.length[place],
            lcp=np.where(again, taken.length[place], taken.lcp[place]),
            params=taken.params[place],
            span=(first, stop),
            key=None if taken.key is None else taken.key[place],
            given=None if taken.given is None else taken.given[place],
        )

    def prompt(self, request: int) -> Int32:
        """Return the token ids of one prompt, shape [length]."""
        start = int(self.start[request])
        return self.tokens[start : start + int(self.length[request])]


@dataclass(frozen=True, slots=True)
class SlotInit:
    """The sampler's settings for the slots that a step opens, arrays of A. They hold for a slot until it is reused."""

    slot: Int32
    row: Int64
    sample: Int32
    seed: Int64
    temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32
    logprobs: Int32
    """The number of alternatives reported besides the chosen token; -1 reports no log-probabilities at all."""
    penalties: SlotPenalties | None = None
    """The penalties of those of the slots whose logits are modified before a token is drawn; None if there are none."""


@dataclass(frozen=True, slots=True)
class SlotPenalties:
    """How the logits of N slots are modified, one entry a slot; `rules` lists the rules slot after slot, `num_rules` of each.

    A rule is a row of 3 + M int32 in `rules`: a token, the bits of the float32 that is added to its logit, and the number of
    output tokens before which it applies; then the M tokens that the context must end with, right-aligned, with -1 in front of
    shorter sequences.
    """

    slot: Int32
    prompt_length: Int32
    repetition: Float64
    presence: Float64
    frequency: Float64
    num_rules: Int32
    rules: Int32


@dataclass(frozen=True, slots=True)
class Alike:
    """A number of samples of one given length, and the average number of pages that each fills in the end."""

    samples: int
    pages: float


@dataclass(frozen=True, slots=True)
class PrefixLevel:
    """One Hydragen pass: G disjoint groups, each attending without a mask to full pages that its members share.

    Group g covers the step's tokens `token_start[g] : token_stop[g]` and the pages
    `page_table[slot[g], page_start[g] : page_stop[g]]`; `slot[g]` is any one member. Token ranges ascend.
    """

    token_start: Int32
    token_stop: Int32
    slot: Int32
    page_start: Int32
    page_stop: Int32


@dataclass(frozen=True, slots=True)
class ScoredPlaces:
    """R places of a step, run by run, whose logits score a given token."""

    token: Int32
    """Positions on the step's token axis at which the logits are computed, shape [R]."""
    target: Int32
    """The tokens that are scored, each following its position, shape [R]."""
    alternatives: int = 0
    """The number of most likely tokens reported for each place."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass. Its fields apply in the order in which they are listed: slots open, the page table changes, pages are
    cleared, pages are copied, the runs are computed, each layer writing all its keys and values before it attends.

    A run is consecutive positions of one slot; the runs lie one after another on the step's token axis, those that bring their
    token ids from the host first (`num_prefill_runs`, `token_ids` of their lengths summed), then the decode runs: one token
    each, the slot's last sampled token, which the worker holds. The position p of a slot lives in page `page_table[slot, p //
    page_size]` at offset `p % page_size`.
    """

    index: int
    inits: SlotInit
    table_slot: Int32
    table_column: Int32
    table_page: Int32
    clear_pages: Int32
    """Pages to set to zero before anything else: they may hold values that are not finite, which no mask hides."""
    copy_src: Int32
    copy_dst: Int32
    num_prefill_runs: int
    run_slot: Int32
    run_start: Int32
    run_length: Int32
    run_samples: Bool
    """True if the run ends at the slot's last known token, so that the next one is drawn; shape [Q]."""
    run_skip: Int32
    """Leading pages of the run's slot that `prefix_levels` cover; the run's own causal pass begins after them."""
    token_ids: Int32
    prefix_levels: tuple[PrefixLevel, ...]
    decode_ids: Int32 | None = None
    """The token of each decode run for a worker of several pipeline stages, whose first stage draws none; None if the worker
    holds the tokens."""
    scored: ScoredPlaces | None = None
    """The places at which given tokens are scored; None if there are none."""
    draws: bool = True
    """False if tokens are only scored and none is drawn: the results of the runs with `run_samples` are then meaningless."""

    @property
    def num_tokens(self) -> int:
        return int(self.run_length.sum())

    def digest(self) -> str:
        """Return 16 hex digits of the SHA-256 of the fields that determine how the step is computed."""
        found = hashlib.sha256()
        for values in (self.table_slot, self.table_column, self.table_page, self.clear_pages, self.copy_src, self.copy_dst):
            found.update(values.tobytes())
        for values in (self.run_slot, self.run_start, self.run_length, self.run_samples, self.run_skip, self.token_ids):
            found.update(values.tobytes())
        return found.hexdigest()[:16]

    def positions(self) -> Int64:
        """Return the position in its slot of each of the step's tokens, shape [T]."""
        first = np.cumsum(self.run_length) - self.run_length
        return np.arange(self.num_tokens) + np.repeat(self.run_start - first, self.run_length)


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of R given tokens, in the order of `ScoredPlaces`: the natural logarithms of their probabilities, and whether
    each is the most likely token, shape [R]."""

    logprob: Float64
    greedy: Bool
    top_ids: Int32 | None = None
    """The most likely tokens in descending order, shape [R, K]; None if none are requested."""
    top_logprobs: Float32 | None = None
    """Their log-probabilities, shape [R, K]."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, arrays of S in the order of the runs with `run_samples`.

    `logprob` is the natural logarithm under the unmodified model distribution (temperature 1, no filter); it is NaN where
    none is requested. `top_ids` and `top_logprobs` have shape [S, K], K the largest number requested in the step (0: none).
    """

    index: int
    token: Int32
    finite: Bool
    """False where the logits held NaN or no finite value; the token is then meaningless."""
    logprob: Float32
    top_ids: Int32
    top_logprobs: Float32
    launch_seconds: float = 0.0
    """CPU time that the worker took to launch the step."""
    scores: Scores | None = None

    @classmethod
    def of_tokens(cls, index: int, token: Int32) -> StepResult:
        """Return a result without log-probabilities, with all logits finite, as a stand-in for the device returns it."""
        count = len(token)
        return cls(
            index=index,
            token=token,
            finite=np.ones(count, np.bool_),
            logprob=np.full(count, np.nan, np.float32),
            top_ids=np.zeros((count, 0), np.int32),
            top_logprobs=np.zeros((count, 0), np.float32),
        )


WORKER_CRASH = "worker_crash"
"""The error code of samples whose row was found to kill workers."""
NOT_JUDGED = "not judged: the run was stopped before"
"""The `verify_error` of finished samples that have no verdict yet."""
Count = TypeVar("Count")


@dataclass(frozen=True, slots=True)
class SampleCounts(Generic[Count]):
    """Counters of a running sample: one sample's numbers (int), or columns over slots (Int32, shape [slots]), one for each
    field. They are 0 when a sample begins, and are kept while it is preempted."""

    cached_tokens: Count
    """Prompt tokens that were already computed when the sample was first admitted."""


NO_COUNTS: SampleCounts[int] = SampleCounts(*(0 for _ in fields(SampleCounts)))


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a given text: the natural logarithm of its probability after the prompt, and whether greedy sampling would
    draw it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample. `token_ids` holds everything sampled, the stop token or the tokens of the stop string included."""

    row_index: int
    sample_index: int
    token_ids: Int32
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or stop token id that ended it; None at the length limit."""
    num_prompt_tokens: int
    counts: SampleCounts[int]
    logprobs: Float32 | None = None
    top_ids: Int32 | None = None
    top_logprobs: Float32 | None = None
    error_code: str | None = None
    error_message: str | None = None
    score: Score | None = None
    """The score of a given text; None for a drawn sample."""
