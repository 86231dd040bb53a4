"""Names of shards: `part-NUMBER.parquet`, or `part-UNIT-NUMBER.parquet` where several writers share a folder."""

from __future__ import annotations

import re

_NAME = re.compile(r"part-(?:(\d{5,})-)?(\d{5,})\.parquet")


def shard_name(number: int, unit: int | None = None) -> str:
    """Return `part-00012.parquet`, or `part-00003-00012.parquet` for a shard of unit 3."""
    return f"part-{'' if unit is None else f'{unit:05d}-'}{number:05d}.parquet"


def is_shard_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def shard_number(name: str) -> int:
    """Return 12 for `data/part-00012.parquet`; for a unit's shard, its number within the unit. Raises ValueError for a name
    that is no shard's."""
    return int(_found(name)[2])


def unit_of_shard(name: str) -> int | None:
    """Return 3 for `data/part-00003-00001.parquet`; None for a shard of no unit. Raises ValueError as `shard_number` does."""
    unit = _found(name)[1]
    return None if unit is None else int(unit)


def _found(name: str) -> re.Match[str]:
    found = _NAME.fullmatch(name.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{name} is not the name of a shard")
    return found
