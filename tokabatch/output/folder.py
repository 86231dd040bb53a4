"""The output folder: where its parts lie.

OUT/data/part-00000.parquet   committed shards
OUT/_tmp/                     unfinished files; cleared by the next claim
OUT/_input/                   the tokenised input, while the run is not complete
OUT/_lock                     held by the writing process, released by its death; several writers share it
OUT/_units/                   where several write: how the plan is cut into units, who computes which, each one's commits
OUT/manifest.json             what the run is, and what decides its output
OUT/commits.jsonl             which shards were committed, with their digests
OUT/row_digests.parquet       what each row and its prompt were
OUT/job.json                  the job, to run it again from the folder alone
OUT/steps-00000.parquet       what each step did and took; not a result
OUT/summary.json, _SUCCESS    how it ended; taken back by the next start that has something to add
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from tokabatch.output.journal import Record, merged, read_record
from tokabatch.output.shard_names import is_shard_name
from tokabatch.storage.atomic_files import DurableFiles
from tokabatch.storage.listing import ListedFile, list_files, list_names

_JOURNAL_NAME = re.compile(r"commits-.+\.jsonl")
_STEPS_NAME = re.compile(r"steps-\d{5,}\.parquet")
_BESIDE = (".log", ".out", ".err", ".sbatch", ".yaml", ".yml")
PLAN, JUDGED, LEASE = "plan-", "judged-", ".lease"
"""The prefixes of the file that says how the plan is cut into units and of shards that got their verdicts late, and the suffix
of lease files."""


class OutputFolder:
    """Paths of an output folder, and its listings. Any process may read it at any time; a listing that fails raises
    OutputError. One of several writers has unfinished files and a journal of its own, by its name."""

    def __init__(self, path: Path, files: DurableFiles | None = None, writer: str = "") -> None:
        self.files = files or DurableFiles()
        self.path = path
        self.data = path / "data"
        self.temporaries = path / "_tmp"
        self.temporary = self.temporaries / writer
        self.units = path / "_units"
        self.joiner = self.units / "joiner"
        self.input = path / "_input"
        self.lock = path / "_lock"
        self.manifest = path / "manifest.json"
        self.commits = path / "commits.jsonl"
        self.journal = self.units / f"commits-{writer}.jsonl" if writer else self.commits
        self.row_digests = path / "row_digests.parquet"
        self.job = path / "job.json"
        self.summary = path / "summary.json"
        self.success = path / "_SUCCESS"

    def shards(self, but: Collection[str] = ()) -> tuple[ListedFile, ...]:
        """List the files with names of shards, by number, except for the names `but`, as `name_of` gives them."""

        def wanted(name: str) -> bool:
            return f"{self.data.name}/{name}" not in but and is_shard_name(name)

        found = list_files(self.files, self.data, wanted)
        return tuple(sorted(found, key=lambda file: (len(file.path.name), file.path.name)))

    def foreign(self) -> list[str]:
        """List names under data/ that no run writes, except hidden ones."""
        return [
            file.path.name
            for file in list_files(self.files, self.data)
            if file.path.name[:1] != "." and not (file.is_file and is_shard_name(file.path.name))
        ]

    def others(self) -> list[str]:
        """List names beside data/ that are no run's, except hidden ones and the files that users keep there: logs, job files,
        batch scripts and the page."""
        own = {path.name for path in vars(self).values() if isinstance(path, Path)} | {"report.html"}
        return [
            name
            for name in list_names(self.files, self.path)
            if not (name in own or name.startswith(".") or name.endswith(_BESIDE) or _STEPS_NAME.fullmatch(name))
        ]

    def steps(self) -> tuple[ListedFile, ...]:
        """List the records of steps, in the order of the starts."""
        return list_files(self.files, self.path, _STEPS_NAME.fullmatch)

    def journals(self) -> list[Path]:
        """List the journals of several writers."""
        return [file.path for file in list_files(self.files, self.units, _JOURNAL_NAME.fullmatch)]

    def record(self) -> Record | None:
        """Read the journals; None if there are none. Raises OutputError if one cannot be read."""
        # A single writer copies all of them into its own before it removes the others.
        others = [read_record(self.files, path) for path in self.journals()]
        return merged((read_record(self.files, self.commits), *others))

    def name_of(self, path: Path) -> str:
        """Return a shard's name as the records have it: relative to the folder."""
        return f"{self.data.name}/{path.name}"
