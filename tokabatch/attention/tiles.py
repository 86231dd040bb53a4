"""A step's attention as a work list, so that the same kernel launches serve every step and can be captured in a CUDA graph.

Attention is cut into tiles: the queries of neighbouring tokens against a range of one slot's keys. Only the keys that a single
decode run reads are left out. `triton_tiles` computes a tile into a plane of partial states, and the decode kernel merges the
planes of a token with the keys that it reads itself (`triton_decode`). Long ranges of keys with few queries are split along the
keys, each part into a plane of its own, so that they occupy the whole device. Input and output are arrays; nothing here runs on
the device.

Shape legend: T tokens of the step, N passes, I tiles, W words of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import StepBatch

WORDS = 8
"""int32 words of a tile: first token, number of tokens, slot, first key, last key + 1, position of the first query, plane,
unused."""
UNMASKED = 1 << 30
"""The position that marks queries that attend to every key of their tile."""
MAX_PLANES, ENOUGH_PLANES = 31, 4
"""The most planes of any step, and the planes of the largest step that is captured."""
SHORT_RUN = 16
"""The longest run, in tokens, whose tokens the decode kernel computes one by one."""
LONG_CONTEXT = 1024
"""Keys above which the context of a short run may be split, and above which that of a long run becomes a pass of its own."""
SPLIT_KEYS, SPLIT_STEP = 256, 64
"""The fewest keys of a part of a split range, and the multiple to which parts are rounded up."""
FEW_TILES, ENOUGH_TILES = 2, 4
"""Tiles per program below which ranges are split, and tiles per program after the split."""
TILE_KEYS = 80
"""The fixed cost of a tile, merging its states included, as a number of keys that take as long."""
EVEN = 0.9
"""The share of busy programs above which one tile for each program is fastest: 256 queries over 32,768 keys then take 3 to 9 %
less time than in seventeen ranges."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """The sizes that tiles are cut for. A tile has `wide` or `narrow` rows; a row is one query with one of the `group` query
    heads of a key-value head. `wide_programs` and `narrow_programs` of them run at once."""

    page_size: int
    num_kv_heads: int
    group: int
    wide: int
    narrow: int
    wide_programs: int
    narrow_programs: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The tiles of a step, [I, W] of each kind, and the work of the decode kernel for each token: it reads the keys from
    `own_T` up to the token's position and merges planes 0 to `planes_T - 1`."""

    wide_IW: Int32
    narrow_IW: Int32
    own_T: Int32
    planes_T: Int32

    @property
    def has_tiles(self) -> bool:
        return len(self.wide_IW) + len(self.narrow_IW) > 0


@dataclass(frozen=True, slots=True)
class _KeyRanges:
    """Passes, arrays of N: the queries of tokens `token : token + queries`, no token twice, against keys `begin : end` of a
    slot."""

    token: Int64
    queries: Int64
    slot: Int64
    begin: Int64
    end: Int64
    position: Int64
    """The position of the first query of a causal pass; UNMASKED if every query attends to every key."""

    def take(self, chosen: Int64) -> _KeyRanges:
        return _KeyRanges(*(getattr(self, name)[chosen] for name in _KeyRanges.__slots__))

    @classmethod
    def of(cls, *columns: Int32 | Int64) -> _KeyRanges:
        return cls(*(column.astype(np.int64) for column in columns))


def plan_tiles(step: StepBatch, shape: TileShape, max_planes: int) -> TilePlan | None:
    """Return the tiles of a step, or None if it needs more than `max_planes` planes."""
    length, size = step.run_length.astype(np.int64), shape.page_size
    token = np.cumsum(length) - length
    covered = step.run_skip.astype(np.int64) * size
    own_T = np.repeat(covered, length)
    passes = [
        _KeyRanges.of(level.token_start, level.token_stop - level.token_start, level.slot, level.page_start * size,
                   level.page_stop * size, np.full(len(level.slot), UNMASKED))
        for level in step.prefix_levels
    ]  # fmt: skip
    planes_T = np.zeros(len(own_T), np.int64)
    passes = _joined(passes, shape)
    runs = _Runs(token, length, step.run_slot.astype(np.int64), covered, step.run_start.astype(np.int64))
    passes += _causal_passes(runs, own_T, size)
    passes += _long_contexts(runs, own_T, shape)
    tiles: tuple[list[Int64], list[Int64]] = ([], [])
    for place, one in enumerate(passes):
        _cut(one, shape, planes_T, max_planes - (len(passes) - 1 - place), tiles)
    if planes_T.max(initial=0) > max_planes:
        return None
    wide, narrow = (_longest_first(found) for found in tiles)
    return TilePlan(wide, narrow, own_T.astype(np.int32), planes_T.astype(np.int32))


@dataclass(frozen=True, slots=True)
class _Runs:
    """The first token, length, slot, first position after the shared pages, and first position of each run."""

    token: Int64
    length: Int64
    slot: Int64
    covered: Int64
    start: Int64

    def take(self, chosen: Int64) -> _Runs:
        return _Runs(*(getattr(self, name)[chosen] for name in _Runs.__slots__))


def _joined(levels: list[_KeyRanges], shape: TileShape) -> list[_KeyRanges]:
    """Merge groups of the prefix levels, given with the shallowest first, into the groups below them.

    The groups below a group read its keys in front of their own if they have all of its queries and if that takes no longer:
    there are then fewer tiles and fewer partial states of each query. Shared keys pay off where the groups would leave tiles
    half empty.
    """
    kept: list[_KeyRanges] = []
    for below in levels:
        if kept and len(below.token):
            above = kept[-1]
            group = np.maximum(np.searchsorted(above.token, below.token, "right") - 1, 0)
            inside = below.token + below.queries <= above.token[group] + above.queries[group]
            inside &= (below.token >= above.token[group]) & (below.begin == above.end[group])
            of, count = group[inside], len(above.token)
            whole = np.bincount(of, below.queries[inside], count) == above.queries
            apart = _tile_cost(above, above.begin, shape) + np.bincount(
                of, _tile_cost(below, below.begin, shape)[inside], count
            )
            together = np.bincount(of, _tile_cost(below, above.begin[group], shape)[inside], count)
            joined = whole & (together <= apart)
            begin = np.where(inside & joined[group], above.begin[group], below.begin)
            below = replace(below, begin=begin)
            kept[-1] = above.take(np.flatnonzero(~joined))
        kept.append(below)
    return [level for level in kept if len(level.token)]


def _tile_cost(passes: _KeyRanges, begin: Int64, shape: TileShape) -> Int64:
    """Return the cost of each pass if it reads keys from `begin` on; the unit is a third of a wide tile's time for one key."""
    is_narrow = passes.queries * shape.group <= 3 * shape.narrow
    height = np.where(is_narrow, shape.narrow, shape.wide) // shape.group
    return -(-passes.queries // height) * (passes.end - begin + TILE_KEYS) * np.where(is_narrow, 1, 3)


def _causal_passes(runs: _Runs, own_T: Int64, size: int) -> list[_KeyRanges]:
    """Return a causal pass for each long run, and an unmasked one for its context if that is long. Sets `own_T` of their tokens
    to UNMASKED: the decode kernel reads no keys for them."""
    long = np.flatnonzero(runs.length > SHORT_RUN)
    if not len(long):
        return []
    runs = runs.take(long)
    own_T[_tokens(runs)] = UNMASKED
    middle = np.where(runs.start - runs.covered > LONG_CONTEXT, runs.start // size * size, runs.covered)
    passes = [_KeyRanges(runs.token, runs.length, runs.slot, middle, runs.start + runs.length, runs.start)]
    before = np.flatnonzero(middle > runs.covered)
    return [*_unmasked(runs.take(before), middle[before]), *passes] if len(before) else passes


def _long_contexts(runs: _Runs, own_T: Int64, shape: TileShape) -> list[_KeyRanges]:
    """Return passes over the keys of short runs that take longer than an equal share of the device's time, and move their
    `own_T` behind those keys."""
    keys = np.where(runs.length <= SHORT_RUN, runs.start - runs.covered, 0)
    if keys.max(initial=0) <= LONG_CONTEXT:
        return []
    share = 2 * float(keys.sum()) * shape.num_kv_heads / shape.narrow_programs
    whole = runs.start // shape.page_size * shape.page_size
    found = np.flatnonzero((keys > max(LONG_CONTEXT, share)) & (whole > runs.covered))
    if not len(found):
        return []
    runs, end = runs.take(found), whole[found]
    own_T[_tokens(runs)] = np.repeat(end, runs.length)
    return _unmasked(runs, end)


def _unmasked(runs: _Runs, end: Int64) -> list[_KeyRanges]:
    return [_KeyRanges(runs.token, runs.length, runs.slot, runs.covered, end, np.full(len(end), UNMASKED))]


def _tokens(runs: _Runs) -> Int64:
    """Return the tokens of the runs, run after run."""
    first = np.cumsum(runs.length) - runs.length
    return np.arange(int(runs.length.sum())) + np.repeat(runs.token - first, runs.length)


def _cut(
    passes: _KeyRanges, shape: TileShape, planes_T: Int64, max_planes: int, tiles: tuple[list[Int64], list[Int64]]
) -> None:
    """Append the tiles of the passes to `tiles` and add their planes to `planes_T`: at most `max_planes`, at least one for each
    pass."""
    rows = passes.queries * shape.group
    # A wide tile takes about as long as three narrow ones over the same keys.
    is_narrow = rows <= 3 * shape.narrow
    parts = np.ones(len(rows), np.int64)
    base = planes_T[passes.token]
    for kind, (height, programs) in enumerate(((shape.wide, shape.wide_programs), (shape.narrow, shape.narrow_programs))):
        chosen = np.flatnonzero(is_narrow == bool(kind))
        if not len(chosen):
            continue
        own = passes.take(chosen)
        per_tile = height // shape.group
        num_tiles = -(-own.queries // per_tile)
        keys = own.end - own.begin
        part_keys = keys
        if num_tiles.sum() * shape.num_kv_heads < FEW_TILES * programs:
            share = float((num_tiles * keys).sum()) * shape.num_kv_heads / programs
            wanted = np.maximum(1, keys // max(SPLIT_KEYS, share)).astype(np.int64)
            busy = share / float((keys / wanted).max())
            if (num_tiles * wanted).sum() * shape.num_kv_heads > programs or busy < EVEN:
                wanted = np.ceil(keys / max(SPLIT_KEYS, share / ENOUGH_TILES)).astype(np.int64)
            num_parts = np.maximum(1, np.minimum(max_planes - base[chosen], wanted))
            part_keys = np.where(num_parts == 1, keys, -(-keys // (num_parts * SPLIT_STEP)) * SPLIT_STEP)
        part_keys = np.where(own.position == UNMASKED, part_keys, keys)
        parts[chosen] = -(-keys // part_keys)
        tiles[kind].append(_tiles(own, num_tiles, per_tile, part_keys, parts[chosen], base[chosen]))
    change = np.zeros(len(planes_T) + 1, np.int64)
    change[passes.token] = parts
    change[passes.token + passes.queries] -= parts
    planes_T += np.cumsum(change)[:-1]


def _tiles(own: _KeyRanges, num_tiles: Int64, per_tile: int, part_keys: Int64, parts: Int64, base: Int64) -> Int64:
    """Return the tiles, shape [I, W], of passes that are cut along their queries and their keys."""
    count = num_tiles * parts
    of = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    tile, part = place // parts[of], place % parts[of]
    shift = tile * per_tile
    queries = np.minimum(per_tile, own.queries[of] - shift)
    masked = own.position[of] != UNMASKED
    begin = own.begin[of] + part * part_keys[of]
    end = np.minimum(own.end[of], begin + part_keys[of])
    # The last query of a causal tile attends to keys up to its own position.
    end = np.where(masked, np.minimum(end, own.position[of] + shift + queries), end)
    position = np.where(masked, own.position[of] + shift, UNMASKED)
    columns = (own.token[of] + shift, queries, own.slot[of], begin, end, position, base[of] + part, np.zeros_like(of))
    return np.stack(columns, axis=1)


def _longest_first(tiles: list[Int64]) -> Int32:
    if not tiles:
        return np.zeros((0, WORDS), np.int32)
    together = np.concatenate(tiles)
    order = np.argsort(together[:, 3] - together[:, 4], kind="stable")
    return together[order].astype(np.int32)
