"""What a run does with an earlier one in its output folder. Imports nothing heavy: the command line refuses it at once."""

from __future__ import annotations

from dataclasses import dataclass

from tokabatch.errors import OutputError


@dataclass(frozen=True, slots=True)
class Reuse:
    """What to do with the results of an earlier run: continue it (default), continue it and run its error rows again, or what
    its damaged files held, or delete them."""

    overwrite: bool = False
    retry_errors: bool = False
    repair: bool = False

    def __post_init__(self) -> None:
        if self.overwrite and self.retry_errors:
            raise OutputError("--overwrite deletes every row, --retry-errors runs the error rows again; give one of the two")
        if self.overwrite and self.repair:
            raise OutputError("--overwrite deletes every row, --repair computes the damaged ones again; give one of the two")

    def refuse_sharing(self) -> None:
        """Raise OutputError where it is not to continue the run: several processes cannot do anything else."""
        if self != Reuse():
            raise OutputError(
                "--shared only computes missing samples; use --overwrite, --retry-errors or --repair in a run without --shared"
            )
