"""Every answer is checked by arithmetic that shares no code with the generator; held-out means held out."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import problem_generator
import pytest
from problem_generator import LEVELS, STEP_COUNTS, Problem, held_out, job_problems, problems, shots, training_problems
from problem_themes import THEMES

QUICKSTART = Path(__file__).parents[3] / "jobs" / "quickstart"
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
# "half", "a third" and the two friends of a pair are the only numbers that a question spells in words.
SPOKEN = {2, 3}


@pytest.fixture(scope="module")
def sample() -> list[Problem]:
    return list(islice(problems("test"), 4000)) + held_out() + shots()


def evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    left, right = evaluate(node.left), evaluate(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise AssertionError(ast.dump(node))


def test_result_is_the_value_of_the_expression(sample: list[Problem]) -> None:
    for problem in sample:
        assert evaluate(ast.parse(problem.expression, mode="eval").body) == problem.result, problem
        assert problem.answer.splitlines()[-1] == f"#### {problem.result}"


def test_every_line_holds_one_true_equation(sample: list[Problem]) -> None:
    for problem in sample:
        lines = problem.answer.splitlines()[:-1]
        assert len(lines) == problem.num_steps in STEP_COUNTS
        for line in lines:
            ((left, operator, right, result),) = EQUATION.findall(line)
            assert evaluate(ast.parse(f"{left} {operator} {right}", mode="eval").body) == int(result), problem
            assert 2 <= int(result) <= LEVELS[problem.level].max_value


def test_steps_use_given_or_found_numbers_and_none_is_idle(sample: list[Problem]) -> None:
    """Each operand is in the question or was computed before; each result is used later or is the answer."""
    for problem in sample:
        given = Counter(int(number) for number in re.findall(r"\d+", problem.question))
        equations = [tuple(map(int, (a, b, c))) for a, _, b, c in EQUATION.findall(problem.answer)]
        for step, (left, right, result) in enumerate(equations):
            known = set(given) | SPOKEN | {found for _, _, found in equations[:step]}
            assert {left, right} <= known, problem
            later = {operand for a, b, _ in equations[step + 1 :] for operand in (a, b)}
            assert step == len(equations) - 1 or result in later, problem
        assert equations[-1][2] == problem.result


def test_comparisons_solved_from_their_words(sample: list[Problem]) -> None:
    """A second reader of the question alone, by its own rules, reaches the same number."""
    comparisons = [problem for problem in sample if problem.theme == "comparison"]
    assert len(comparisons) > 100
    for problem in comparisons:
        assert solve_comparison(problem.question) == problem.result, problem


def solve_comparison(question: str) -> Fraction:
    owned: dict[str, Fraction] = {}
    *facts, asked = re.findall(r"[^.?]+[.?]", question)
    for fact in (fact.strip() for fact in facts):
        if found := re.fullmatch(r"(\w+) has (\d+) times as many \w+ as (\w+)\.", fact):
            owned[found[1]] = owned[found[3]] * int(found[2])
        elif found := re.fullmatch(r"(\w+) has half as many \w+ as (\w+)\.", fact):
            owned[found[1]] = owned[found[2]] / 2
        elif found := re.fullmatch(r"(\w+) has (\d+) (more|fewer) \w+ than (\w+)\.", fact):
            owned[found[1]] = owned[found[4]] + int(found[2]) * (1 if found[3] == "more" else -1)
        elif found := re.fullmatch(r"(\w+) (?:has|owns) (\d+) \w+\.", fact):
            owned[found[1]] = Fraction(int(found[2]))
    if found := re.search(r"How many more \w+ does (\w+) have than (\w+)\?", asked):
        return owned[found[1]] - owned[found[2]]
    if found := re.search(r"How many \w+ do (\w+) and (\w+) have together\?", asked):
        return owned[found[1]] + owned[found[2]]
    if found := re.search(r"How many \w+ does (\w+) have\?", asked):
        return owned[found[1]]
    return sum(owned.values(), Fraction(0))


def test_variety(sample: list[Problem]) -> None:
    assert {problem.theme for problem in sample} == {theme.name for theme in THEMES} | {"comparison"}
    assert {problem.num_steps for problem in sample} == set(STEP_COUNTS)
    assert {problem.level for problem in sample} == set(range(len(LEVELS)))
    assert {operator for problem in sample for _, operator, _, _ in EQUATION.findall(problem.answer)} == set("+-*/")
    assert not any("{" in problem.question + problem.answer for problem in sample)


def test_equal_streams_are_equal() -> None:
    assert list(islice(problems("a"), 50)) == list(islice(problems("a"), 50)) != list(islice(problems("b"), 50))


def test_held_out_problems_are_distinct_from_each_other_and_the_shots() -> None:
    prints = [print_ for problem in held_out() + shots() for print_ in problem.fingerprints()]
    assert len(set(prints)) == len(prints)


def test_training_holds_no_held_out_problem_neither_its_words_nor_its_arithmetic() -> None:
    """On a part of the training data, and with a planted problem that the first block would draw otherwise."""
    excluded = problem_generator.fingerprints_of(held_out() + shots())
    held_questions = {problem.question for problem in held_out()}
    held_arithmetic = {problem.expression for problem in held_out()}
    for block in range(3):
        kept = list(training_problems(block, 4000, excluded))
        assert len(kept) > 3900
        assert not held_questions & {problem.question for problem in kept}
        assert not held_arithmetic & {problem.expression for problem in kept}
    planted = next(training_problems(0, 1, frozenset()))
    kept = list(training_problems(0, 4000, excluded | set(planted.fingerprints())))
    assert planted.question not in {problem.question for problem in kept}


def test_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    problem_generator.write_files(tmp_path)
    for name in ("problems.jsonl", "shots.jsonl"):
        assert (tmp_path / name).read_text() == (QUICKSTART / name).read_text(), f"{name}: run problem_generator.py"


def test_problems_file() -> None:
    rows = [json.loads(line) for line in (QUICKSTART / "problems.jsonl").read_text().splitlines()]
    assert len(rows) == problem_generator.NUM_JOB_PROBLEMS
    assert all(set(row) == {"question", "answer"} for row in rows)
    assert [row["question"] for row in rows] == [problem.question for problem in job_problems()]
    assert {problem.question for problem in job_problems()} <= {problem.question for problem in held_out()}
