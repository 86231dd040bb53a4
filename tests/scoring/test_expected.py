"""What a verifier expected is shown in the form in which it compares."""

from __future__ import annotations

from typing import Any

import pytest

from tokabatch.scoring.expected import expected_answers


@pytest.mark.parametrize(
    ("verify", "reference", "expected"),
    [
        ({"kind": "gsm8k", "answer": "a"}, "40 - 20 = 20 notes\n#### 1,072", ["1072"]),
        ({"kind": "choice", "answer": "a"}, 2, ["C"]),
        ({"kind": "exact", "answer": "a", "options": {"normalize": "squad"}}, ["The Cat", "a dog"], ["cat", "dog"]),
        ({"kind": "regex", "answer": "a", "options": {"pattern": "[0-9]+"}}, 3, ["3"]),
        ({"kind": "regex", "answer": None, "options": {"pattern": "[0-9]+"}}, 3, []),
        ({"kind": "code", "answer": None}, 3, []),
        ({"kind": "./judge.py", "answer": "a"}, 3, []),
        ({"kind": "gsm8k", "answer": "not there"}, 3, []),
    ],
)
def test_expected_answers(verify: dict[str, Any], reference: Any, expected: list[str]) -> None:
    assert expected_answers(verify, {"a": reference}) == expected
