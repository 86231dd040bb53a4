"""The command line. Nothing heavy is imported at its start, so that help answers at once: a command imports what it needs, by
`import_module`."""

from __future__ import annotations

from tokabatch.cli.commands import app, main, program

__all__ = ["app", "main", "program"]
