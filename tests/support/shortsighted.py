"""A prediction of lengths that is always too short."""

from __future__ import annotations

from tokabatch.arrays import Bool, Int32, Int64


class Shortsighted:
    """Takes every sample to end at its next token, so that far too many are admitted."""

    def predict(self, request: Int32, sample: Int32, generated: Int32, limit: Int32, ticket: Int64) -> Int32:
        return generated + 1

    def observe(self, request: Int32, length: Int32, stopped: Bool) -> None:
        pass

    def refresh(self, request: Int32, generated: Int32) -> bool:
        return False
