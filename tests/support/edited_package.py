"""A copy of the package with a few edits, made as a reader who follows a recipe of its README would make them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tokabatch


@dataclass
class EditedPackage:
    """The copy lies in `folder`; `changed` are the files that were opened for the edits."""

    folder: Path
    changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        source = Path(tokabatch.__file__).parent
        shutil.copytree(source, self.folder / "tokabatch", ignore=shutil.ignore_patterns("__pycache__"))

    def add(self, name: str, text: str) -> None:
        """A file that is not there yet."""
        file = self.folder / "tokabatch" / name
        assert not file.exists(), name
        file.write_text(text)
        self.changed.add(name)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace the one place of a file that reads `old`."""
        file = self.folder / "tokabatch" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} places that read {old!r}: mend this test, and the recipe"
        file.write_text(text.replace(old, new))
        self.changed.add(name)

    def run(self, job: Path) -> subprocess.CompletedProcess[str]:
        """`tokabatch run JOB` of this copy."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-P", "-m", "tokabatch", "run", str(job)]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)
