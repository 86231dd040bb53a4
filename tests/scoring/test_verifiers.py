"""Each verifier against texts as models write them, and what all verifiers promise."""

from __future__ import annotations

import importlib.util
import sys
import time
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokabatch.job import verifier_names
from tokabatch.scoring.judge import Judge, JudgeSpec
from tokabatch.scoring.verifiers import choice, exact, gsm8k, regex

REFERENCES = {"choice": "A", "exact": "x", "gsm8k": "#### 5", "math": r"\frac{1}{2}", "regex": "7"}
OPTIONS = {"regex": {"pattern": r"(\d+)"}}
HAS_MATH = importlib.util.find_spec("math_verify") is not None
WITH_REFERENCES = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == "math" and not HAS_MATH, reason="needs math-verify (extra: math)"))
    for kind in REFERENCES
]


def right(verifier: ModuleType, text: str, reference: Any, **options: Any) -> bool:
    return verifier.verify(text, {"reference": reference}, answer="reference", **options)["score"]


def loaded(kind: str) -> Judge:
    return Judge(JudgeSpec(kind, f"tokabatch.scoring.verifiers.{kind}", "verify", "reference", OPTIONS.get(kind, {})))


def test_the_files_are_the_registry() -> None:
    assert verifier_names() == ("choice", "code", "exact", "gsm8k", "math", "regex")


@pytest.mark.parametrize("kind", WITH_REFERENCES)
def test_every_verifier_keeps_the_contract(kind: str) -> None:
    judge = loaded(kind)
    (verdict,) = judge.verdicts(["text"], [{"reference": None}])
    assert (verdict.correct, verdict.score) == (None, None) and "reference answer" in str(verdict.error)
    assert judge.check({"reference": None}) == verdict.error and judge.check({"reference": REFERENCES[kind]}) is None


@pytest.mark.parametrize("kind", WITH_REFERENCES)
@pytest.mark.parametrize("reference", [["7"], ["none"], {"a": "7"}, b"7", timedelta(seconds=7)], ids=str)
def test_a_row_is_refused_if_its_texts_cannot_be_judged_and_only_then(kind: str, reference: Any) -> None:
    judge = loaded(kind)
    (verdict,) = judge.verdicts(["7"], [{"reference": reference}])
    assert judge.check({"reference": reference}) == verdict.error
    if (kind, reference) in (("gsm8k", ["7"]), ("exact", ["7"])):
        assert verdict.correct
    if kind == "exact" and isinstance(reference, (dict, bytes)):
        assert "is an object or binary data" in str(verdict.error)


@pytest.mark.parametrize("kind", WITH_REFERENCES)
@given(text=st.text())
def test_no_text_breaks_a_verifier(kind: str, text: str) -> None:
    (verdict,) = loaded(kind).verdicts([text], [{"reference": REFERENCES[kind]}])
    assert verdict.error is None and verdict.correct is (verdict.score == 1)
    assert set(verdict.columns) <= {"extracted"}


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
    ("text", "reference", "expected"),
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
def test_gsm8k_compares_exactly(text: str, reference: object, expected: bool) -> None:
    assert right(gsm8k, text, reference) is expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is $29.00.", "29"),
        ("so 72 clips, altogether.", "72"),
        ("The answer is 1/2", "1/2"),
        ("#### 3 1/2 hours", "7/2"),
        ("#### \\frac{3}{4}", "3/4"),
        ("so \\boxed{-\\dfrac{1}{2}}", "-1/2"),
        ("\\boxed{\\frac{-1}{2}}", "-1/2"),
        ("#### 2\\tfrac{1}{3}", "7/3"),
        ("\\frac12", "1/2"),
        ("it is ½ a cup", "1/2"),
        ("#### 1½", "3/2"),
        ("1\u20442", "1/2"),
        ("\\boxed{18}. That took 3 steps.", "18"),
        ("\\boxed{18 \\text{ dollars}}", "18"),
        ("\\boxed{x = 18}", "18"),
        ("\\boxed{1{,}234}", "1234"),
        ("#### 1\\,234\\,567", "1234567"),
        ("first \\boxed{3}, then \\boxed{4}", "4"),
        ("#### 9 * 2 = 18", "18"),
        ("#### total = 18", "18"),
        ("#### 18 = total", "18"),
        ("**#### 18**", "18"),
        ("\\[ 5 + 3 = 8 \\]", "8"),
        ("72 / 4", "18"),
        ("€1,234.50", "1234.5"),
        ("\\$5", "5"),
        ("£ 5", "5"),
        ("5 USD", "5"),
        ("Rs.500", "500"),
        ("-$5", "-5"),
        ("a loss of \u20137 dollars", "-7"),
        ("negative 5", "-5"),
        ("it is minus 5 degrees", "-5"),
        ("50\\%", "50"),
        ("12.5 percent", "12.5"),
        ("10 000 people", "10000"),
        ("1\u202f234\u202f567", "1234567"),
        ("1'000'000", "1000000"),
        ("1_000", "1000"),
        ("1,00,000 rupees", "100000"),
        ("5 million", "5000000"),
        ("$2.5M", "2500000"),
        ("5k", "5000"),
        ("5 km", "5"),
        ("5kg", "5"),
        ("the 18th", "18"),
        ("18!", "18"),
        ("- 5 apples", "5"),
        ("5.)", "5"),
        ("#### 5 - the end", "5"),
        ("#### -0.50", "-1/2"),
    ],
)
def test_gsm8k_reads_numbers_as_they_are_written(text: str, number: str) -> None:
    found = gsm8k.find_answer(text)
    assert found is not None and Fraction(found) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "#### 1e3",
        "1e3",
        "1.5 * 10^3",
        "1.5 \N{MULTIPLICATION SIGN} 10\u00b3",
        "2^5",
        "2**5",
        "2^{10}",
        "\\sqrt{16}",
        "3\\sqrt{2}",
        "\u221a16",
        "\\frac{\\sqrt{3}}{2}",
        "2x",
        "3\u03c0",
        "2\\pi",
        "5 + 3",
        "#### 5 + 3",
        "10 - 4",
        "10 minus 4",
        "4 x 5",
        "4 \\times 5",
        "3:4",
        "10:30",
        "12/05/2023",
        "1.2.3",
        "12,50",
        "1.234,56",
        "#### 18-20",
        "#### 1,2",
        "1/0",
    ],
)
def test_gsm8k_takes_no_part_of_what_is_not_one_number(text: str) -> None:
    assert gsm8k.find_answer(f"It is 7. So {text}" if "#" not in text else text) is None


def test_gsm8k_fractions_are_compared_exactly() -> None:
    assert right(gsm8k, "The answer is 1/2", "0.5") and right(gsm8k, "#### 0.5", "1/2") and right(gsm8k, "2/4", "\\frac{1}{2}")
    assert not right(gsm8k, "The answer is 1/2", 2) and not right(gsm8k, "The answer is 1/2", 1)
    assert not right(gsm8k, "#### 0.333", "1/3") and right(gsm8k, "#### 1 1/2", Decimal("1.5"))
    assert right(gsm8k, "#### 1000", Decimal("1E+3"))
    assert not right(gsm8k, "#### -100000000000000000000000000000000001", "-100000000000000000000000000000000002")


def test_gsm8k_takes_no_time_for_odd_texts() -> None:
    began = time.process_time()
    assert not right(gsm8k, "1/" + "9" * 5000, 1) and not right(gsm8k, "9" * 5000 + "/3", 1)
    for piece in ("1+", "1 ", "9", "\\frac{", "\\text{", "{", "1,", "- ", "1/", "\u221a(", "negative ", "1 1/", "\\boxed{"):
        gsm8k.find_answer(piece * 20_000)
    assert time.process_time() - began < 5


def test_gsm8k_refuses_a_reference_without_a_number() -> None:
    for reference in ("none", True, float("nan"), float("-inf"), ""):
        with pytest.raises(ValueError, match="holds no number"):
            right(gsm8k, "#### 1", reference)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_gsm8k_reads_what_it_is_written(number: Decimal) -> None:
    for text in (f"#### {number:f}", f"#### {number:,f}", f"so it is {number:f}.", f"= {number:,f} dollars"):
        assert right(gsm8k, text, str(number.quantize(Decimal("0.001")).__format__("f")))


def test_exact() -> None:
    assert right(exact, "  yes\n", "yes")
    assert right(exact, "42", 42)
    assert not right(exact, "Yes", "yes")
    assert not right(exact, "yes it is", "yes")


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
        ("answer: (c)", "C"),
        ("Answer: c", "C"),
        ("the answer is b.", "B"),
        ("answer: a", "A"),
        ("Answer: a\nBecause it fits", "A"),
        ("answer: d) dog", "D"),
        ("the correct answer is (b) because", "B"),
        ("The answer is A because it fits", "A"),
        ("**C**", "C"),
        ("It is **c)** then", "C"),
        ("**B. Paris**", "B"),
        ("option C", "C"),
        ("so option c is correct", "C"),
        ("Choice (d) fits best", "D"),
        ("I choose (b)", "B"),
        ("I would go with D", "D"),
        ("We reason, and so C is the correct answer here", "C"),
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{b}}. Option A is close.", "B"),
        ("$\\boxed{(C)}$", "C"),
        ("The answer is $\\textbf{(D)}$", "D"),
        ("The answer is \\(C\\)", "C"),
        ("<answer>B</answer>", "B"),
        ('Answer: "C"', "C"),
        ("Answer - C", "C"),
        ("The answer is C. Option B is wrong.", "C"),
        ("Option B is wrong, option C fits", "C"),
        ("(a) is wrong, (b) is right", "B"),
        ("b", "B"),
        ("c) 42", "C"),
        ("B is wrong, so (C)", "C"),
        ("C is right", "C"),
        ("The answer is C.", "C"),
        ("The answer is a number", None),
        ("answer: a train", None),
        ("A is wrong", None),
        ("The answer is not B", None),
        ("a lot of cats", None),
        ("I picked a dog and b-sides", None),
        ("answer: C-4", None),
        ("The answer is Berlin", None),
        ("E", None),
        ("", None),
    ],
)
def test_choice_finds_the_letter(text: str, letter: str | None) -> None:
    assert choice.find_choice(text) == letter


def test_choice_takes_no_time_for_odd_texts() -> None:
    began = time.process_time()
    for piece in (" ", "answer ", "answer is the ", "a ", "option B ", "option ", "(", "**", "answer: a ", "is the ", "B is "):
        choice.find_choice("answer" + piece * 20_000 + "x")
        choice.find_choice("option B" + piece * 20_000 + "x")
    assert time.process_time() - began < 5


def test_choice_takes_letters_and_indices() -> None:
    for reference in ("B", "b", "(B)", "B.", 1):
        assert right(choice, "Answer: B", reference)
    for reference in ("E", "AB", "", 4, -1, True, 1.0):
        with pytest.raises(ValueError, match="no letter from A to D"):
            right(choice, "Answer: B", reference)


def test_exact_compares_as_configured() -> None:
    assert right(exact, "Yes", "yes", normalize="lower") and not right(exact, "Yes.", "yes", normalize="lower")
    assert right(exact, "The  Eiffel tower!", "eiffel tower", normalize="squad")
    assert right(exact, "b", ["a", "b"]) and not right(exact, "c", ["a", "b"])
    for reference in (None, [], ["a", None]):
        with pytest.raises(ValueError, match="is null"):
            right(exact, "a", reference)
    with pytest.raises(ValueError, match=r"normalize is 'upper'; write one of strip, lower, squad"):
        exact.check_options(normalize="upper")


def test_regex() -> None:
    assert right(regex, "1, 2, then 7", 7, pattern=r"\d") and not right(regex, "1, 2", "1", pattern=r"\d")
    assert right(regex, "1, 2", "1", pattern=r"\d", which="first") and not right(regex, "none", "1", pattern=r"\d")
    assert right(regex, "so: Paris.", "paris", pattern=r"so: (\w+)", ignore_case=True)
    assert regex.verify("any 5", {}, pattern=r"\d")["score"] and not regex.verify("any", {}, pattern=r"\d")["score"]
    for options, message in [
        ({"pattern": "("}, "not a valid regular expression"),
        ({"pattern": 5}, "pattern is 5; write a text"),
        ({"pattern": "a", "which": "all"}, "first or last"),
    ]:
        with pytest.raises(ValueError, match=message):
            regex.check_options(**options)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is (F).", "F", True),
        ("answer: j", "J", True),
        ("I think it is Mars, so the answer is C", 2, True),
        ("answer: I think so", "I", False),
        ("Answer: I.", "I", True),
        ("K", "K", False),
    ],
)
def test_choice_with_ten_letters(text: str, answer: Any, expected: bool) -> None:
    if answer == "K":
        with pytest.raises(ValueError, match="no letter from A to J"):
            right(choice, text, answer, letters="ABCDEFGHIJ")
    else:
        assert right(choice, text, answer, letters="ABCDEFGHIJ") is expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("mars", "B"),
        ("It is the red planet Mars, of course", "B"),
        ("Mars or Venus", None),
        ("the answer is (c): Mars", "C"),
        ("Marsupials", None),
        ("D", None),
    ],
)
def test_choice_by_the_text_of_an_option(text: str, letter: str | None) -> None:
    for answer in ("Mars", "B", 1):
        row = {"options": ["Venus", "Mars", "Jupiter"], "answer": answer}
        found = choice.verify(text, row, answer="answer", choices="options")
        assert found == {"score": letter == "B", "extracted": letter}
    for answer in ("Saturn", "D", 3, None):
        with pytest.raises(ValueError, match="nor one of the options"):
            choice.check({**row, "answer": answer}, answer="answer", choices="options")
    with pytest.raises(ValueError, match="'options' is not a list"):
        choice.check({"answer": "B", "options": "none"}, answer="answer", choices="options")


@pytest.mark.skipif(not HAS_MATH, reason="needs math-verify (extra: math)")
@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        (r"so it is $\frac{2}{4}$", r"\frac{1}{2}", True),
        (r"The answer is \boxed{0.5}.", "1/2", True),
        (r"$x + 1$", "1 + x", True),
        (r"\boxed{(1, 2)}", "(2, 1)", False),
        ("no idea", "3", False),
        (r"\boxed{7}", r"Adding, we have $3 + 4 = \boxed{7}$.", True),
    ],
)
def test_math(text: str, reference: str, expected: bool) -> None:
    (verdict,) = loaded("math").verdicts([text], [{"reference": reference}])
    assert verdict.correct is expected, verdict


def test_math_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "tokabatch.scoring.verifiers.math", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'tokabatch\[math\]'"):
        loaded("math")
