"""The verifiers of the package: one file each, whose name is the job's `verify.kind`.

Each is written as a user's own would be (`tokabatch.scoring.judge` has the contract): `verify(text, row, *, answer)`, with the
answer found in the text as the column `extracted`, and `check`, which raises ValueError with the reason for a reference that it
cannot parse. `expected` returns the right answers as texts, for people to see beside `extracted`: normalised as that is, or
as the row has them if they are compared as formulas (`math`). A text that it cannot parse is wrong, never an error.
"""
