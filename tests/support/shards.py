"""Shards of hand-made tables."""

from __future__ import annotations

import pyarrow as pa

from tokabatch.output.shard_writer import ShardWriter


def write_rows(writer: ShardWriter, table: pa.Table) -> None:
    """Take the rows over and commit what is due, as a run's recorder does."""
    writer.take(table)
    writer.commit_due()
