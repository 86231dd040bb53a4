"""Penalties and biases: changes to the logits of some rows before a token is drawn from them.

In this order, which is transformers' and vLLM's: rules add their values (`logit_bias`; minus infinity for `bad_words`, and for
tokens that would end a sample before `min_tokens`), then the tokens of prompt and output are divided by `repetition_penalty`,
or multiplied where the logit is negative (Keskar et al. 2019, arXiv:1909.05858), then output tokens lose `frequency_penalty`
for each time they occur and `presence_penalty` once.

The tokens that these depend on are kept as keys and values are, a page of ids for each page of the cache: what samples share
is there once, a copied page brings its tokens along, and a sample that starts again, on this worker or another, finds its own
as soon as they are computed. No count is kept from step to step.

Shape legend: N penalised slots opened, B penalised rows, V vocabulary, L positions, R rules of a row, M tokens of a rule's
context, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention.base import token_slots
from tokabatch.attention.upload import Outbox, Parcel
from tokabatch.scheduling.contracts import SlotPenalties, StepBatch

_BLOCK_CPU = 1 << 21
_BLOCK_DEVICE = 1 << 26
"""Logits processed at a time: some 12 bytes of scratch memory each."""
_ANY, _NONE = -1, -2
_TOKEN, _VALUE, _UNTIL, _BEFORE = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class PenalisedRows:
    """The penalised rows of a step, with the facts about them that the host needs."""

    table: Penalties
    count: int
    row: Parcel
    """Their places among the step's rows, int64; likewise their slots and the positions of the tokens to draw."""
    slot: Parcel
    position: Parcel
    longest: int
    """The largest position, or 0 where no row's context matters."""
    counted: bool
    """Some row has a penalty besides rules."""
    num_rules: int
    num_before: int
    """Tokens of the longest context of a rule."""

    def blocks(self, vocab_size: int) -> Iterator[PenalisedBlock]:
        """Yield the rows in parts that bound the scratch memory."""
        row, slot, position = (parcel.tensor for parcel in (self.row, self.slot, self.position))
        most = _BLOCK_CPU if row.device.type == "cpu" else _BLOCK_DEVICE
        size = max(1, most // max(vocab_size, 4 * self.longest))
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            yield PenalisedBlock(self, row[part], slot[part], position[part])


@dataclass(frozen=True, slots=True)
class PenalisedBlock:
    """Some of the penalised rows of a step."""

    rows: PenalisedRows
    row_B: torch.Tensor
    slot_B: torch.Tensor
    position_B: torch.Tensor


class Penalties:
    """State on the device: the token ids of all pages, the page table, and each slot's penalties."""

    def __init__(self, num_slots: int, max_pages: int, num_pages: int, page_size: int, vocab_size: int, device: torch.device):
        self._device, self._page_size, self._vocab_size = device, page_size, vocab_size
        self._tokens = torch.zeros(num_pages, page_size, dtype=torch.int32, device=device)
        self._table = torch.zeros(num_slots, max_pages, dtype=torch.int32, device=device)
        self._numbers = torch.zeros(num_slots, 4, dtype=torch.float64, device=device)
        """The length of the prompt, repetition, presence and frequency penalty of each slot."""
        self._rules = self._no_rules(num_slots, 0, 0)
        # What the host needs to launch a step, by slot.
        self._penalised, self._counted = np.zeros((2, num_slots), np.bool_)
        self._num_rules, self._num_before = np.zeros((2, num_slots), np.int32)

    def follow(self, step: StepBatch, last_token: torch.Tensor, outbox: Outbox) -> None:
        """Register the slots that a step opens, the changes to the page table and the tokens that it computes, all of it done
        once the outbox is sent. `last_token` are the tokens drawn last, by slot."""
        if len(step.inits.slot):
            self._penalised[step.inits.slot] = False
        if step.inits.penalties is not None:
            self._open(step.inits.penalties, outbox)
        cell = step.table_slot.astype(np.int64) * self._table.shape[1] + step.table_column
        values = (cell, step.table_page, step.copy_src, step.copy_dst.astype(np.int64))
        changes = [outbox.add(each) for each in values]
        computed = [outbox.add(each) for each in (token_slots(step), step.positions(), step.token_ids)]

        def change() -> None:
            cell, page, source, target = (parcel.tensor for parcel in changes)
            slot_T, position_T, given = (parcel.tensor for parcel in computed)
            self._table.view(-1).index_copy_(0, cell, page)
            if len(source):
                self._tokens.index_copy_(0, target, self._tokens.index_select(0, source))
            token_T = torch.cat((given, last_token.index_select(0, slot_T[len(given) :]).int()))
            page_T = self._table[slot_T, position_T // self._page_size].long()
            self._tokens.view(-1).index_copy_(0, page_T * self._page_size + position_T % self._page_size, token_T)

        outbox.once_sent(change)

    def any_in(self, slots: Int32) -> bool:
        """Return whether any of these slots is penalised."""
        return bool(self._penalised[slots].any())

    def rows(self, slots: Int32, positions: Int32, outbox: Outbox) -> PenalisedRows | None:
        """Return which of a step's rows are penalised, by slot and position of the token to draw; None if none is."""
        row = np.flatnonzero(self._penalised[slots])
        if not len(row):
            return None
        slots, positions = slots[row], positions[row]
        counted, num_before = bool(self._counted[slots].any()), int(self._num_before[slots].max())
        return PenalisedRows(
            table=self,
            count=len(row),
            row=outbox.add(row),
            slot=outbox.add(slots),
            position=outbox.add(positions),
            longest=int(positions.max()) if counted or num_before else 0,
            counted=counted,
            num_rules=int(self._num_rules[slots].max()),
            num_before=num_before,
        )

    def apply(self, logits_BV: torch.Tensor, block: PenalisedBlock) -> torch.Tensor:
        """Return the changed logits of a block's rows, [B, V] of a wider tensor, float64 for float64 and else float32."""
        vocab_size, rows = logits_BV.shape[1], block.rows
        dtype = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
        # One column more takes what is meant for no token. Every row begins at 64 bytes.
        width = -(-(vocab_size + 1) // 16) * 16
        wide_BV = torch.empty(len(logits_BV), width, dtype=dtype, device=logits_BV.device)
        wide_BV[:, :vocab_size] = logits_BV
        wide_BV[:, vocab_size:] = 0
        numbers_4B1 = self._numbers.index_select(0, block.slot_B).T[..., None]
        prompt_B1 = numbers_4B1[0].long()
        context_BL = self._context(block, vocab_size) if rows.longest else None
        if rows.num_rules:
            self._apply_rules(wide_BV, vocab_size, block, prompt_B1, context_BL)
        if rows.counted and context_BL is not None:
            repetition_B1, presence_B1, frequency_B1 = numbers_4B1[1:].to(dtype)
            times_BL = _times(context_BL, prompt_B1, width)
            old_BL = wide_BV.gather(1, context_BL)
            new_BL = torch.where(old_BL < 0, old_BL * repetition_B1, old_BL / repetition_B1)
            new_BL = new_BL - frequency_B1 * times_BL - presence_B1 * (times_BL > 0)
            # A token that occurs several times is written as often, and always the same.
            wide_BV.scatter_(1, context_BL, new_BL)
        return wide_BV[:, :vocab_size]

    def _context(self, block: PenalisedBlock, vocab_size: int) -> torch.Tensor:
        """Return the tokens at the positions before the one to draw, int64, `vocab_size` at the others."""
        num_pages = -(-block.rows.longest // self._page_size)
        page_BN = self._table[:, :num_pages].index_select(0, block.slot_B)
        token_BL = self._tokens.index_select(0, page_BN.flatten()).view(len(page_BN), -1).long()
        before_BL = torch.arange(token_BL.shape[1], device=token_BL.device) < block.position_B[:, None]
        return token_BL.masked_fill_(~before_BL, vocab_size)

    def _apply_rules(
        self,
        wide_BV: torch.Tensor,
        vocab_size: int,
        block: PenalisedBlock,
        prompt_B1: torch.Tensor,
        context_BL: torch.Tensor | None,
    ) -> None:
        rules_BRW = self._rules[:, : block.rows.num_rules].index_select(0, block.slot_B)
        position_B1 = block.position_B[:, None].long()
        applies_BR = position_B1 - prompt_B1 < rules_BRW[..., _UNTIL]
        num_before = block.rows.num_before
        if num_before and context_BL is not None:
            place_BM = position_B1 + torch.arange(-num_before, 0, device=position_B1.device)
            tail_BM = context_BL.gather(1, place_BM.clamp(min=0)).masked_fill_(place_BM < 0, _NONE)
            asked_BRM = rules_BRW[..., rules_BRW.shape[2] - num_before :]
            applies_BR &= ((asked_BRM == _ANY) | (asked_BRM == tail_BM[:, None])).all(-1)
        value_BR = rules_BRW[..., _VALUE].contiguous().view(torch.float32)
        # Those of one token differ in minus infinity at most, so that their order does not show.
        token_BR = rules_BRW[..., _TOKEN].long().masked_fill_(~applies_BR, vocab_size)
        wide_BV.scatter_add_(1, token_BR, value_BR.masked_fill(~applies_BR, 0.0).to(wide_BV.dtype))

    def _open(self, opened: SlotPenalties, outbox: Outbox) -> None:
        slots, num_slots = opened.slot, len(opened.slot)
        self._penalised[slots] = True
        self._counted[slots] = (opened.repetition != 1) | (opened.presence != 0) | (opened.frequency != 0)
        self._num_rules[slots] = opened.num_rules
        most, before = int(opened.num_rules.max()), opened.rules.shape[1] - _BEFORE
        self._num_before[slots] = before
        self._make_room(most, before)
        capacity, words = self._rules.shape[1:]
        rules_NRW = np.full((num_slots, capacity, words), _ANY, np.int32)
        rules_NRW[..., _TOKEN], rules_NRW[..., _VALUE], rules_NRW[..., _UNTIL] = self._vocab_size, 0, 0
        owner = np.repeat(np.arange(num_slots), opened.num_rules)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(opened.num_rules) - opened.num_rules, opened.num_rules)
        rules_NRW[owner, place, :_BEFORE] = opened.rules[:, :_BEFORE]
        # An end token that only the tokenizer has.
        np.minimum(rules_NRW[..., _TOKEN], self._vocab_size, out=rules_NRW[..., _TOKEN])
        rules_NRW[owner, place, words - before :] = opened.rules[:, _BEFORE:]
        numbers = np.stack((opened.prompt_length, opened.repetition, opened.presence, opened.frequency), 1)
        parcels = [outbox.add(each) for each in (slots.astype(np.int64), numbers.astype(np.float64), rules_NRW)]

        def store() -> None:
            slot_N, numbers_N4, rules_NRW = (parcel.tensor for parcel in parcels)
            self._numbers.index_copy_(0, slot_N, numbers_N4)
            self._rules.index_copy_(0, slot_N, rules_NRW)

        outbox.once_sent(store)

    def _make_room(self, num_rules: int, num_before: int) -> None:
        """Make room for slots with this many rules, whose contexts have this many tokens."""
        num_slots, capacity, words = self._rules.shape
        if num_rules <= capacity and num_before <= words - _BEFORE:
            return
        old, self._rules = self._rules, self._no_rules(num_slots, max(num_rules, capacity), max(num_before, words - _BEFORE))
        self._rules[:, :capacity, :_BEFORE] = old[..., :_BEFORE]
        self._rules[:, :capacity, self._rules.shape[2] - (words - _BEFORE) :] = old[..., _BEFORE:]

    def _no_rules(self, num_slots: int, capacity: int, num_before: int) -> torch.Tensor:
        rules = torch.full((num_slots, capacity, _BEFORE + num_before), _ANY, dtype=torch.int32, device=self._device)
        rules[..., _TOKEN], rules[..., _VALUE], rules[..., _UNTIL] = self._vocab_size, 0, 0
        return rules


def _times(context_BL: torch.Tensor, prompt_B1: torch.Tensor, width: int) -> torch.Tensor:
    """Count how often the token at each position occurs in its row's output; all tokens are below `width`."""
    counts_BV = torch.zeros(len(context_BL), width, dtype=torch.int32, device=context_BL.device)
    is_output_BL = torch.arange(context_BL.shape[1], device=context_BL.device) >= prompt_B1
    counts_BV.scatter_add_(1, context_BL, is_output_BL.int())
    return counts_BV.gather(1, context_BL)
