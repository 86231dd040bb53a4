"""The verifiers that come with the package: one file each, whose name is the `verify.kind` of the job.

Each is written as one of a user's own would be (`tokabatch.scoring.judge` has the contract): `verify(text, row, *, answer)`,
with the answer that it found in the text as the column `extracted`, and `check`, which raises ValueError, saying why, where the
reference is none that it understands. A text that it does not understand is wrong, never an error.
"""
