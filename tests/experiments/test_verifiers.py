"""Each verifier against texts as models write them, and what all verifiers promise."""

from __future__ import annotations

import inspect
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokabatch.experiments.verifiers import choice, exact, gsm8k, load_verifier
from tokabatch.job import verifier_names


def test_the_files_are_the_registry() -> None:
    assert verifier_names() == ("choice", "exact", "gsm8k")
    assert load_verifier("gsm8k") is gsm8k.verify


@pytest.mark.parametrize("kind", verifier_names())
def test_every_verifier_keeps_the_contract(kind: str) -> None:
    verify = load_verifier(kind)
    assert list(inspect.signature(verify).parameters) == ["text", "reference"]
    assert inspect.getdoc(verify)
    with pytest.raises(ValueError, match="reference answer"):
        verify("text", None)


@pytest.mark.parametrize("kind", verifier_names())
@given(text=st.text())
def test_no_text_breaks_a_verifier(kind: str, text: str) -> None:
    reference = {"choice": "A", "exact": "x", "gsm8k": "#### 5"}[kind]
    assert load_verifier(kind)(text, reference) in (True, False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = 13\n#### 13", "13"),
        ("#### 1,234,567", "1234567"),
        ("#### $18.50", "18.50"),
        ("#### -7", "-7"),
        ("#### -$7", "-7"),
        ("#### $-7", "-7"),
        ("#### \N{MINUS SIGN}7", "-7"),
        ("#### 20%", "20"),
        ("#### 42.", "42"),
        ("#### 42 apples, not 43", "42"),
        ("####42\n\nQuestion: what is 7 + 1?\n#### 8", "42"),
        ("####\n42\n43", "42"),
        ("#### \\boxed{42}", "42"),
        ("the sum is 42 ####", "42"),
        ("#### none\nso 41", "41"),
        ("She has 3 boxes, so 12 in all.", "12"),
        ("so x=-5", "-5"),
        ("between 3-4", "4"),
        ("one, two, 1,2,3", "3"),
        ("it is .5", ".5"),
        ("it is...42", "42"),
        ("**9**", "9"),
        ("use x2 and H2O", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_gsm8k_finds_the_answer(text: str, number: str | None) -> None:
    assert gsm8k.find_answer(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("#### 18", "9 * 2 = <<9*2=18>>18\n#### 18", True),
        ("#### 18.00", 18, True),
        ("#### 18", 18.0, True),
        ("#### 0.1", "0.10", True),
        ("#### 0.3", "0.30000000000000004", False),
        ("#### 100000000000000000001", "100000000000000000000", False),
        ("#### 1000", "1,000", True),
        ("#### 100000000000000000000", 1e20, True),
        ("#### 17", "18", False),
        ("no idea", "18", False),
    ],
)
def test_gsm8k_compares_exactly(text: str, reference: object, right: bool) -> None:
    assert gsm8k.verify(text, reference) is right


def test_gsm8k_refuses_a_reference_without_a_number() -> None:
    for reference in ("none", True, float("nan"), float("-inf"), ""):
        with pytest.raises(ValueError, match="holds no number"):
            gsm8k.verify("#### 1", reference)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_gsm8k_reads_what_it_is_written(number: Decimal) -> None:
    for text in (f"#### {number:f}", f"#### {number:,f}", f"so it is {number:f}.", f"= {number:,f} dollars"):
        assert gsm8k.verify(text, str(number.quantize(Decimal("0.001")).__format__("f")))


def test_exact() -> None:
    assert exact.verify("  yes\n", "yes")
    assert exact.verify("42", 42)
    assert not exact.verify("Yes", "yes")
    assert not exact.verify("yes it is", "yes")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("**Answer:** D", "D"),
        ("The answer is A? No, the correct answer is B", "B"),
        ("the answer would be option C, I think", "C"),
        ("B", "B"),
        (" B. because it fits", "B"),
        ("(D) because", "D"),
        ("C) 42", "C"),
        ("A train leaves at noon, hence (C).", "C"),
        ("A train leaves at noon.", None),
        ("Both [A] and (B) are close, but {B}", "B"),
        ("The answer is Berlin", None),
        ("E", None),
        ("", None),
    ],
)
def test_choice_finds_the_letter(text: str, letter: str | None) -> None:
    assert choice.find_choice(text) == letter


def test_choice_takes_letters_and_indices() -> None:
    for reference in ("B", "b", "(B)", "B.", 1):
        assert choice.verify("Answer: B", reference)
    for reference in ("E", "AB", "", 4, -1, True, 1.0):
        with pytest.raises(ValueError, match="no letter from A to D"):
            choice.verify("Answer: B", reference)
