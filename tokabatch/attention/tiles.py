"""A step's attention as a work list, so that its launches are the same whatever the step holds: they can be captured.

All that a step attends to, but for the keys that a decode run reads alone, is cut into tiles: some queries of neighbouring
tokens against a range of one slot's keys. `triton_tiles` computes a tile into a plane of partial states, and the decode kernel
merges a token's planes with what it reads itself (`triton_decode`). Long ranges of few queries are split along their keys, into
planes of their own, so that they fill the device. Arrays in, arrays out.

Shape legend: T tokens of the step, N passes, I tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.attention.capturable import PrefixKind
from tokabatch.scheduling.contracts import StepBatch

WORDS = 8
"""Of a tile: first token, tokens, slot, first key, last key + 1, the first query's position, plane, unused."""
UNMASKED = 1 << 30
"""The position of queries that see every key of their tile."""
MAX_PLANES, ENOUGH_PLANES = 31, 4
"""Planes that a step has at most, and that the largest has."""
SHORT_RUN = 16
"""Tokens of a run up to which the decode kernel serves each of them by itself."""
LONG_CONTEXT = 1024
"""Keys of a short run from which they may be split, and of the context of a long one from which it is a pass of its own."""
SPLIT_KEYS, SPLIT_STEP = 256, 64
"""Fewest keys of a split range, and what it is a multiple of."""
FEW_TILES, ENOUGH_TILES = 2, 4
"""Tiles a program of the device below which ranges are split, and how many they are then split into."""
TILE_KEYS = 80
"""Each tile costs what so many keys do, and its states are merged."""
EVEN = 0.9
"""Share of the time in which programs are busy with one tile each, from which that is the fastest: 256 queries over 32,768 keys
take 3 to 9 % less so than in seventeen ranges."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """What tiles are cut for. A tile has `wide` or `narrow` rows, a row being a query head of the key-value head's `group`;
    `programs` of each run at once."""

    page_size: int
    num_kv_heads: int
    group: int
    wide: int
    narrow: int
    wide_programs: int
    narrow_programs: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """`own_T` is the first key that the decode kernel reads for each token itself, up to the token's position; `planes_T` the
    partial states that it merges, planes 0 to that."""

    wide_IW: Int32
    narrow_IW: Int32
    own_T: Int32
    planes_T: Int32

    @property
    def has_tiles(self) -> bool:
        return len(self.wide_IW) + len(self.narrow_IW) > 0


@dataclass(frozen=True, slots=True)
class _KeyRanges:
    """Queries of tokens `token : token + queries`, no token twice, against keys `begin : end` of a slot."""

    token: Int64
    queries: Int64
    slot: Int64
    begin: Int64
    end: Int64
    position: Int64
    """Of the first query, where later queries see more; UNMASKED where all see all."""

    def take(self, chosen: Int64) -> _KeyRanges:
        return _KeyRanges(*(getattr(self, name)[chosen] for name in _KeyRanges.__slots__))

    @classmethod
    def of(cls, *columns: Int32 | Int64) -> _KeyRanges:
        return cls(*(column.astype(np.int64) for column in columns))


def plan_tiles(step: StepBatch, shape: TileShape, max_planes: int, prefix: PrefixKind | None = None) -> TilePlan | None:
    """None where a step needs more planes than there are. The first pages of its first level's only group, and the first planes
    of each token, are those of a pass of this `prefix` where one is given, and not cut into tiles."""
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
    if prefix is not None:
        passes[0] = replace(passes[0], begin=passes[0].begin + prefix.pages * size)
        passes = [one for one in passes if (one.end > one.begin).any()]
        planes_T += prefix.parts
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
    """First token, length, slot, position behind the shared pages, and first position of each run."""

    token: Int64
    length: Int64
    slot: Int64
    covered: Int64
    start: Int64

    def take(self, chosen: Int64) -> _Runs:
        return _Runs(*(getattr(self, name)[chosen] for name in _Runs.__slots__))


def _joined(levels: list[_KeyRanges], shape: TileShape) -> list[_KeyRanges]:
    """Prefix levels, shallow ones first, in which the keys of a group are read by the groups below it, in front of their own,
    where these have all its queries and that takes no longer: it makes fewer tiles and fewer states of each query. To share
    keys pays where groups leave tiles half empty."""
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
    """Of each pass, were it to read keys from `begin` on, in thirds of what a wide tile takes for one."""
    is_narrow = passes.queries * shape.group <= 3 * shape.narrow
    height = np.where(is_narrow, shape.narrow, shape.wide) // shape.group
    return -(-passes.queries // height) * (passes.end - begin + TILE_KEYS) * np.where(is_narrow, 1, 3)


def _causal_passes(runs: _Runs, own_T: Int64, size: int) -> list[_KeyRanges]:
    """Long runs: a causal pass each, and one before it over a long context. Takes their tokens out of `own_T`."""
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
    """Short runs whose own keys take longer than a fair share of the device; moves their `own_T` behind those keys."""
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
    """The tokens of some runs, run after run."""
    first = np.cumsum(runs.length) - runs.length
    return np.arange(int(runs.length.sum())) + np.repeat(runs.token - first, runs.length)


def _cut(
    passes: _KeyRanges, shape: TileShape, planes_T: Int64, max_planes: int, tiles: tuple[list[Int64], list[Int64]]
) -> None:
    """Appends the tiles of some passes, and counts their tokens' planes: up to `max_planes`, but one for each pass at least."""
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
    """[I, WORDS]: each pass along its queries and its keys."""
    count = num_tiles * parts
    of = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    tile, part = place // parts[of], place % parts[of]
    shift = tile * per_tile
    queries = np.minimum(per_tile, own.queries[of] - shift)
    masked = own.position[of] != UNMASKED
    begin = own.begin[of] + part * part_keys[of]
    end = np.minimum(own.end[of], begin + part_keys[of])
    # The last query of a causal tile sees up to its own position.
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
