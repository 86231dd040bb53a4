from __future__ import annotations

import pytest

from tokabatch.output.shard_names import is_shard_name, shard_name, shard_number, unit_of_shard


@pytest.mark.parametrize("unit", [None, 0, 3, 123_456])
@pytest.mark.parametrize("number", [0, 12, 1_234_567])
def test_a_name_is_read_as_it_was_made(number: int, unit: int | None) -> None:
    name = shard_name(number, unit)
    assert is_shard_name(name)
    assert (shard_number(f"data/{name}"), unit_of_shard(name)) == (number, unit)


@pytest.mark.parametrize("name", ["part-1.parquet", "part-00001.parquet.new", "part-00001-1.parquet", "judged-part-1.parquet"])
def test_other_names_are_no_shards(name: str) -> None:
    assert not is_shard_name(name)
    with pytest.raises(ValueError, match="not the name of a shard"):
        shard_number(name)
