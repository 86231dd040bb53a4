"""The most likely tokens of each row on a GPU, with their logprobs, from the summaries of `triton_sampling`.

The k largest logits of a row lie in the k parts whose maxima are largest, so only those parts are read, and the tokens taken
from them one by one: worth it up to 32. More are selected by torch. Among equals the lower id comes first (torch promises
no order). Imports triton. Shape legend: S rows, K alternatives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokabatch.model.sampling.triton_rows import PART, Rows, key_of, value_of

_MOST = 32
_LOGITS_AT_ONCE = 1 << 28


@triton.jit
def _ordered(key, place, exists):
    """An int64 that sorts by key, and among equals with the lower place ahead; least of all where nothing exists."""
    return tl.where(exists, (key.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), -(2**63))


@triton.jit
def _place(ordered):
    return 0x7FFFFFFF - (ordered & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "wanted"])
def _alternatives(
    logits_ptr, highest_ptr, log_total_ptr, results_ptr, vocab, row_stride, num_parts, part_stride, num_rows, wanted,
    WIDTH: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, WIDTH)
    highest = tl.load(highest_ptr + row * part_stride + part, mask=part < part_stride, other=float("-inf"))
    left = _ordered(key_of(highest, 0), part, part < num_parts)
    slot = tl.arange(0, TAKEN)
    taken = tl.full((TAKEN,), 0, tl.int32) + num_parts
    for turn in range(0, tl.minimum(wanted, num_parts)):
        best = tl.max(left, 0)
        taken = tl.where(slot == turn, _place(best), taken)
        left = tl.where(left == best, -(2**63), left)

    token = taken[:, None] * PART + tl.arange(0, PART)[None, :]
    inside = (taken[:, None] < num_parts) & (token < vocab)
    x = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    candidates = _ordered(key_of(x, 0), token, inside)
    log_total = tl.load(log_total_ptr + row)
    for turn in range(0, wanted):
        best = tl.max(tl.max(candidates, 1), 0)
        candidates = tl.where(candidates == best, -(2**63), candidates)
        logprob = value_of((best >> 32).to(tl.int32), 0) - log_total
        tl.store(results_ptr + (3 + turn) * num_rows + row, _place(best))
        tl.store(results_ptr + (3 + wanted + turn) * num_rows + row, logprob.to(tl.int32, bitcast=True))


def report_alternatives(rows: Rows, highest: torch.Tensor, log_total_S: torch.Tensor, results: torch.Tensor) -> None:
    """Writes K ids and the bits of their K logprobs behind the first three rows of `results`, most likely first."""
    num_rows, vocab = rows.logits_SV.shape
    wanted = (results.shape[0] - 3) // 2
    if wanted <= _MOST:
        _alternatives[(num_rows,)](
            rows.logits_SV, highest, log_total_S, results,
            vocab, rows.row_stride, rows.num_parts, rows.part_stride, num_rows, wanted,
            WIDTH=rows.width, TAKEN=triton.next_power_of_2(wanted), num_warps=rows.num_warps,
        )  # fmt: skip
        return
    block = max(1, _LOGITS_AT_ONCE // vocab)
    for start in range(0, num_rows, block):
        some = slice(start, start + block)
        logits_SK, ids_SK = rows.logits_SV[some].topk(wanted, dim=-1)
        results[3 : 3 + wanted, some] = ids_SK.T
        results[3 + wanted :, some] = (logits_SK.float() - log_total_S[some, None]).T.contiguous().view(torch.int32)
