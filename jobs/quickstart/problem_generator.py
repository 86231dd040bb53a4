"""Grade-school word problems with step-by-step answers, drawn from a seed.

Contract: `generate(rng)` returns a `Problem` whose answer lines each hold one equation `3 * 4 = 12` in whole numbers (division
is exact, nothing is negative) and whose last line is `#### N`. `expression` is the same computation over the question's
numbers alone, for an independent check. The stories are in `problem_themes.py`; this file knows numbers, order and grammar.

    python jobs/quickstart/problem_generator.py --out jobs/quickstart     writes problems.jsonl and shots.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from problem_themes import CONTAINERS, DISTRACTORS, MEN, THEMES, WOMEN, Event, Theme

NUM_JOB_PROBLEMS = 48
NUM_HELD_OUT = 320
"""The job's problems are among them; the training script measures itself on the others too."""
JOB_LEVELS = (1, 2, 2)
"""In turn: a third of the job's problems has two-digit numbers, the rest three-digit ones."""
SHOT_STEPS = (3, 2, 4, 3)


class Rejected(Exception):
    """These draws make no whole-number problem; draw again."""


@dataclass(frozen=True)
class Level:
    ranges: dict[str, tuple[int, int]]
    max_divisor: int
    max_value: int


LEVELS = (
    Level({"count": (5, 40), "few": (2, 9), "each": (2, 12), "small": (2, 5), "times": (2, 5)}, 12, 999),
    Level({"count": (10, 99), "few": (3, 15), "each": (5, 40), "small": (2, 12), "times": (2, 9)}, 25, 9_999),
    Level({"count": (100, 999), "few": (6, 40), "each": (12, 120), "small": (3, 30), "times": (3, 12)}, 60, 99_999),
)
STEP_COUNTS = (2, 3, 4, 5, 6)
STEP_WEIGHTS = (20, 25, 25, 18, 12)


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    expression: str
    result: int
    level: int
    num_steps: int
    theme: str

    def fingerprints(self) -> tuple[str, str]:
        """Hashes of the question's words and of its arithmetic; two problems that share neither are different problems."""
        return _digest(self.question), _digest(self.expression)


@dataclass(frozen=True)
class Value:
    number: int
    expression: str


@dataclass
class Draft:
    """A problem in the making: its draws so far, and the text that they produced."""

    rng: random.Random
    level: Level
    words: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def say(self, variants: tuple[str, ...], **words: object) -> None:
        self.sentences.append(self.rng.choice(variants).format(**self.words, **words))

    def calculate(self, left: Value, operator: str, right: Value, line: str, **words: object) -> Value:
        number = _apply(left.number, operator, right.number)
        if not 2 <= number <= self.level.max_value:
            raise Rejected
        equation = f"{left.number} {operator} {right.number} = {number}"
        variant = self.rng.choice(line.split("|"))
        self.lines.append(variant.format(eq=equation, **self.words, **words))
        return Value(number, f"({left.expression}{operator}{right.expression})")

    def draw(self, kind: str, total: Value | None) -> Value:
        if kind in self.level.ranges:
            number = self.rng.randint(*self.level.ranges[kind])
        elif total is None:
            raise Rejected
        elif kind == "less":
            number = self.rng.randint(2, max(2, total.number - 2))
        elif kind == "more":
            number = total.number + self.rng.randint(2, total.number + 10)
        else:
            highest = min(self.level.max_divisor, total.number // 2)
            divisors = [d for d in range(2, highest + 1) if total.number % d == 0]
            if not divisors:
                raise Rejected
            number = self.rng.choice(divisors)
        return Value(number, str(number))


def generate(rng: random.Random, num_steps: int | None = None) -> Problem:
    """One problem. `num_steps` fixes the number of its equations, else 2 to 6 are drawn."""
    steps = num_steps or rng.choices(STEP_COUNTS, STEP_WEIGHTS)[0]
    level = rng.randrange(len(LEVELS))
    while True:
        try:
            if rng.random() < 0.2:
                return _comparison(rng, level, steps)
            return _story(rng, level, steps, rng.choice(THEMES))
        except Rejected:
            continue


def problems(stream: str) -> Iterator[Problem]:
    """The endless sequence of problems that `stream` names; equal names give equal sequences."""
    rng = random.Random(stream)
    while True:
        yield generate(rng)


def held_out() -> list[Problem]:
    """The problems that training never sees; no two share a fingerprint with each other or a shot."""
    return list(islice(_unseen(problems("held-out"), fingerprints_of(shots())), NUM_HELD_OUT))


def job_problems() -> list[Problem]:
    """The first held-out problems of the levels that `JOB_LEVELS` names in turn; the easy level is too easy for the model."""
    of_level = {level: iter([p for p in held_out() if p.level == level]) for level in JOB_LEVELS}
    return [next(of_level[JOB_LEVELS[index % len(JOB_LEVELS)]]) for index in range(NUM_JOB_PROBLEMS)]


def shots() -> list[Problem]:
    """The worked examples of the few-shot header, each from another theme."""
    rng = random.Random("shots")
    chosen: list[Problem] = []
    for num_steps in SHOT_STEPS:
        shot = generate(rng, num_steps)
        while any(shot.theme == other.theme for other in chosen):
            shot = generate(rng, num_steps)
        chosen.append(shot)
    return chosen


def training_problems(block: int, count: int, excluded: frozenset[str]) -> Iterator[Problem]:
    """`count` draws of training block `block`, less those that share a fingerprint with `excluded`."""
    for problem in islice(problems(f"train-{block}"), count):
        if excluded.isdisjoint(problem.fingerprints()):
            yield problem


def fingerprints_of(some: list[Problem]) -> frozenset[str]:
    return frozenset(print_ for problem in some for print_ in problem.fingerprints())


def _unseen(candidates: Iterator[Problem], seen: frozenset[str]) -> Iterator[Problem]:
    taken = set(seen)
    for problem in candidates:
        prints = problem.fingerprints()
        if taken.isdisjoint(prints):
            taken.update(prints)
            yield problem


def _story(rng: random.Random, level: int, steps: int, theme: Theme) -> Problem:
    draft = Draft(rng, LEVELS[level], _cast(rng))
    draft.words |= {"o": rng.choice(theme.objects), "c": rng.choice(CONTAINERS)}
    event = rng.choice(theme.starts)
    ending = rng.choice([e for e in theme.endings if len(e.steps) < steps])
    total = _happen(draft, theme, event, None)
    while len(draft.lines) + len(ending.steps) < steps:
        room = steps - len(draft.lines) - len(ending.steps)
        event = rng.choice([e for e in theme.middles if len(e.steps) <= room and e is not event])
        total = _happen(draft, theme, event, total)
    if len(draft.lines) + len(ending.steps) != steps:
        raise Rejected
    total = _happen(draft, theme, ending, total)
    return _finish(draft, total, level, theme.name)


def _happen(draft: Draft, theme: Theme, event: Event, total: Value | None) -> Value:
    """Tell one event and compute what follows from it."""
    a = draft.draw(event.a, total) if event.a else None
    b = draft.draw(event.b, total) if event.b else None
    others = [o for o in theme.objects if not any(o in sentence for sentence in draft.sentences)]
    words = {"a": a.number if a else "", "b": b.number if b else "", "i": draft.rng.choice(others)}
    draft.say(event.sentences, **words)
    known = {"t": total, "a": a, "b": b}
    if not event.steps and total is None:
        known["t"] = a
    for result, left, operator, right, line in event.steps:
        operands = [known.get(name) or Value(int(name), name) for name in (left, right)]
        known[result] = draft.calculate(operands[0], operator, operands[1], line, **words)
    assert known["t"] is not None
    return known["t"]


def _comparison(rng: random.Random, level: int, steps: int) -> Problem:
    """Several people, each with more, fewer, half or some times as many things as one named before."""
    draft = Draft(rng, LEVELS[level], {"o": rng.choice(THEMES[0].objects)})
    kind = rng.choice(("last", "difference", "pair") + (("all",) if steps % 2 == 0 else ()))
    relations = steps if kind == "last" else steps // 2 if kind == "all" else steps - 1
    names = rng.sample(WOMEN + MEN, relations + 1)
    first = draft.draw("count", None)
    draft.say(("{p} has {n} {o}.", "{p} owns {n} {o}."), p=names[0], n=first.number)
    values = [first]
    for name in names[1:]:
        # The last relation needs every earlier one only if each points at its predecessor, so that no step is idle.
        other = rng.randrange(len(values)) if kind == "all" else len(values) - 1
        values.append(_relate(draft, name, names[other], values[other]))
    if kind == "last":
        draft.say(("How many {o} does {p} have?",), p=names[-1])
        return _finish(draft, values[-1], level, "comparison")
    if kind == "difference":
        high, low = (-1, -2) if values[-1].number > values[-2].number else (-2, -1)
        draft.say(("How many more {o} does {p} have than {q}?",), p=names[high], q=names[low])
        result = draft.calculate(values[high], "-", values[low], "{p} has {eq} {o} more.", p=names[high])
        return _finish(draft, result, level, "comparison")
    if kind == "pair":
        draft.say(("How many {o} do {p} and {q} have together?",), p=names[-2], q=names[-1])
        values, names = values[-2:], names[-2:]
    else:
        draft.say(("How many {o} do they all have together?", "How many {o} is that in total?"))
    total = values[0]
    for name, value in zip(names[1:], values[1:], strict=True):
        total = draft.calculate(total, "+", value, "With {p} that is {eq} {o}.|Adding {p} makes {eq} {o}.", p=name)
    return _finish(draft, total, level, "comparison")


def _relate(draft: Draft, name: str, other: str, base: Value) -> Value:
    kind = draft.rng.choice(("times", "more", "fewer", "half"))
    if kind == "half":
        draft.say(("{p} has half as many {o} as {q}.",), p=name, q=other)
        return draft.calculate(base, "/", Value(2, "2"), "{p} has {eq} {o}.", p=name)
    if kind == "times":
        amount, operator, sentence = draft.draw("times", base), "*", "{p} has {n} times as many {o} as {q}."
    elif kind == "more":
        amount, operator, sentence = draft.draw("count", base), "+", "{p} has {n} more {o} than {q}."
    else:
        amount, operator, sentence = draft.draw("less", base), "-", "{p} has {n} fewer {o} than {q}."
    draft.say((sentence,), p=name, q=other, n=amount.number)
    return draft.calculate(base, operator, amount, "{p} has {eq} {o}.", p=name)


def _finish(draft: Draft, total: Value, level: int, theme: str) -> Problem:
    sentences = draft.sentences
    if draft.rng.random() < 0.3:
        words = _cast(draft.rng) | draft.words
        distractor = draft.rng.choice(DISTRACTORS).format(**words, n=draft.rng.randint(3, 60))
        sentences.insert(draft.rng.randrange(1, len(sentences)), distractor)
    question = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    lines = [line[0].upper() + line[1:] for line in draft.lines]
    answer = "\n".join([*lines, f"#### {total.number}"])
    return Problem(question, answer, total.expression, total.number, level, len(lines), theme)


def _cast(rng: random.Random) -> dict[str, str]:
    woman, man = rng.choice(WOMEN), rng.choice(MEN)
    if rng.random() < 0.5:
        return {"p": woman, "q": man, "he": "she", "He": "She", "him": "her"}
    return {"p": man, "q": woman, "he": "he", "He": "He", "him": "him"}


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "/":
        if left % right:
            raise Rejected
        return left // right
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _write(path: Path, some: list[Problem]) -> None:
    lines = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in some]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_files(folder: Path) -> None:
    _write(folder / "problems.jsonl", job_problems())
    _write(folder / "shots.jsonl", shots())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the quickstart's held-out problems and worked examples.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    write_files(parser.parse_args().out)
