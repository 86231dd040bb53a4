"""What is said of text that is not YAML: the line, what is wrong with it, what to write instead."""

from __future__ import annotations

import time

import pytest

from tokabatch.errors import JobError
from tokabatch.job.document import parse_document

FAULTS = [
    # Indentation.
    ("model:\n  path: m\n dtype: x\n", 3, "it is indented by 1, as no line above"),
    ("model:\n  path: m\n    dtype: x\n", 3, "indented further than `path: m`, which has its value already"),
    ("model: {path: m}\n  input: {path: p}\n", 2, "indented further than `model: {path: m}`"),
    (" model: {path: m}\ninput: {path: p}\n", 1, "begin every section in the first column"),
    ("model:\n\tpath: m\n", 2, "there is a tab in column 1; indent with spaces"),
    ("a:\n  - b: 1\n  c: 2\n", 3, "items of a list (-) and keys cannot stand side by side"),
    # Brackets.
    ("model: {path: m\ninput: {path: p}\n", 1, "the { in column 8 is not closed; add }"),
    ("a:\n  stop: ['x', 'y'\n", 2, "the [ in column 9 is not closed; add ]"),
    ("model: {path: m}}\ninput: {path: p}\n", 1, "} in column 17 closes nothing; remove it"),
    ("a: {stop: [b}}\n", 1, "} in column 13 does not close the [ before it; write ] there"),
    ("a: {n: 4 temperature: 1.0}\n", 1, "a comma is missing in front of `temperature`"),
    ('{"a": {"b": "m"}\n "c": {"d": "p"}}\n', 2, 'a comma is missing in front of `"c":`'),
    ("prompt: {template: Q: {{ q }}}\n", 1, "a colon and a space needs quotes"),
    # Quotes.
    ('a:\n  b: "Q: x\nc:\n  n: 4\n', 2, 'the quote " in column 6 is not closed'),
    ('a:\n  b: "Q: x\nc:\n  stop: "x"\n', 2, 'the quote " in column 6 is closed only on line 4; close it here'),
    ('a: {b: "x}\nc: {d: "Q: {{ q }}"}\n', 1, 'the quote " in column 8 is not closed'),
    ('a: {b: "Q:\n  say "hi" {{ q }}"}\n', 2, 'write \\" for a " within it'),
    ("a: {b: 'Q:\n  it's {{ q }}'}\n", 2, "write '' for a ' within it"),
    ("a:\n  b: 'What's {{ q }}?'\n", 2, "`b: 'What''s {{ q }}?'`"),
    ("a: {b: 'What's {{ q }}?'}\n", 1, "write '' for a ' within it"),
    ('a:\n  b: "Say "hi" to {{ q }}"\n', 2, '`b: "Say \\"hi\\" to {{ q }}"`'),
    ('a:\n  b: "Q" {{ q }}\n', 2, "text goes on behind its closing quote"),
    ("a:\n  b: 'm' dtype: x\n", 2, "two keys stand on one line; begin `dtype: x` on a line of its own"),
    ("a:\n  b: \u201cQ: x\u201d\n", 2, '`b: "Q: x"`'),
    ('a: "\\d+"\n', 1, "a backslash begins an escape, and \\d is none; write \\\\d"),
    ('a: "C:\\users"\n', 1, "\\u is none; write \\\\u"),
    ("a:\n  bcde:\tm\n", 2, "there is a tab in column 8; write a space instead"),
    # Text written with | or >.
    ("a:\n  b: |\n    text\nmodel: {path: m}}\n", 4, "} in column 17 closes nothing"),
    ("a:\n  b: |\n    text\ngeneration\n  n: 4\n", 4, "write `generation:`"),
    (
        "a:\n  b: |\n  Question {{ q }}\n  Answer\n",
        3,
        "the text below `b: |` ends in front of it; indent every line of that text by 4",
    ),
    ("a:\n  b: |\n    Q: {{ q }}\n   A:\nc: 1\n", 4, "the text below `b: |` ends in front of it"),
    ("a:\n  b: | Q {{ q }}\n", 2, "the text of | or > begins on the next line"),
    ("a:\n  b: |\n  Q: 1\n  A:\n", 2, "a.b: has no text; indent every line of it further"),
    # Colons.
    ("a:\n  path:m\n  dtype: x\n", 2, "a space is missing behind the colon: write `path: m`"),
    ("a:\n  dtype: x\n  path:m\nc: 1\n", 3, "write `path: m`"),
    ("a:\n  path m\n  dtype: x\n", 2, "a colon is missing: write `path: m`"),
    ("model\n  path: m\n", 1, "a colon is missing: write `model:`"),
    ("a:\n  path: m\n  dtype = x\n", 3, "write `dtype: x`"),
    ("a:\n  b: Question: {{ q }}\n", 2, '`b: "Question: {{ q }}"`'),
    # A first character with a meaning.
    ("a:\n  b: {{ q }} and more\n", 2, 'a template needs quotes, because { begins a mapping: `b: "{{ q }} and more"`'),
    ("a:\n  b: {{ q }}\\nA:\n", 2, '`b: "{{ q }}\\nA:"`'),
    ("a:\n  b: {% if q %}{{ q }}{% endif %}\n", 2, "a template needs quotes"),
    ("a:\n  b: %s\n", 2, 'text that begins with % needs quotes: `b: "%s"`'),
    ("a:\n  b: @file.txt\n", 2, 'text that begins with @ needs quotes: `b: "@file.txt"`'),
    ("a:\n  b: *bold*\n", 2, "text that begins with * needs quotes"),
    ("a:\n  b: ? x\n", 2, "text that begins with ? needs quotes"),
    ("a:\n  b: - x\n", 2, "a list on the line of its key is written in brackets"),
    ("a: x\x01y\n", 1, "`a: x<U+0001>y` is not valid YAML: it holds a control character, U+0001"),
    # Items of lists.
    ("a:\n  b:\n    - x\n    -y\n", 4, "a space is missing behind the dash: write `- y`"),
    ("a:\n  b:\n  -'x'\n  c: 1\n", 3, "a space is missing behind the dash: write `- 'x'`"),
    # Characters that end a line in YAML 1.1 alone.
    ("a: x\u2028b: y\n", 1, "the character that is shown by its code does not end the line here"),
    ('# word\u0085y\na: "z\n', 2, 'the quote " in column 4 is not closed'),
    # Signs that look like others.
    ('a:\n  b: "Mot :\u00a0x"\n  c: Q: {{ q }}\n', 3, "a colon and a space needs quotes"),
    ("a:\n  b: |\n    Mot :\u00a0\nc: d: 4\n", 4, "a colon and a space needs quotes"),
    ("a: x # Mot :\u00a0x\nc: d: 4\n", 2, "a colon and a space needs quotes"),
    ("a:\n  number:\u00a02\n  c: 1\n", 2, "the space in column 10 is U+00A0 (no-break space); write an ordinary one"),
    ("a: {b: \u201c{{ q }}\u201d}\n", 1, "\u201c is no quote in YAML; write straight ones"),
    # Whole files.
    ("a: 1\n---\nb: 2\n", 2, "a line --- begins a second job"),
    ("a: 1\n...\nb: 2\n", 2, "`...` ends the document; remove it"),
    ("```yaml\na: 1\n```\n", 1, "lines of ``` belong to the page"),
    ("<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> x\n", 1, "keep one, and remove the marks"),
    ("[model]\npath = 'm'\n", 1, "a job is YAML, not TOML; write `model:`"),
]


@pytest.mark.parametrize(("text", "line", "message"), FAULTS, ids=[repr(text) for text, _, _ in FAULTS])
def test_faults(text: str, line: int, message: str) -> None:
    try:
        document = parse_document(text, "job.yaml")
    except JobError as refused:
        said = str(refused)
        assert f": `{text.split(chr(10))[line - 1].strip()[:4]}" in said
    else:
        (path, at, what), *_ = document.problems
        said = f"job.yaml:{at}: {'.'.join(map(str, path))}: {what}"
    assert said.startswith(f"job.yaml:{line}: ") and message in said
    assert not any(word in said for word in ("expected", "scanning", "parsing", "mapping values"))


@pytest.mark.parametrize("sign", ["\u0085", "\u2028", "\u2029"])
def test_characters_that_end_a_line_in_yaml_1_1_alone_are_ordinary_ones(sign: str) -> None:
    text = f'# one{sign}b: 2\na: x{sign}y  # {sign}\nc: |\n  word{sign}y\n  z\nd: "q{sign}r"\nk{sign}: 1\n'
    read = parse_document(text, "job.yaml")
    assert read.values == {"a": f"x{sign}y", "c": f"word{sign}y\nz\n", "d": f"q{sign}r", f"k{sign}": 1}
    assert read.lines[("d",)] == 6
    with pytest.raises(JobError, match=rf"job\.yaml:1: `<U\+{ord(sign):04X}>a: 'x<U\+{ord(sign):04X}>y` is not valid"):
        parse_document(f"{sign}a: 'x{sign}y\n", "job.yaml")


def test_a_fault_of_no_known_kind_is_quoted() -> None:
    with pytest.raises(JobError, match=r"job\.yaml:3: `f: 1` is not valid YAML: YAML's parser says: mapping values are not"):
        parse_document("a:\n  b c d:e\n  f: 1\n", "job.yaml")


def test_long_lines_cost_no_time() -> None:
    began = time.process_time()
    for text in ("a:\n  b: '" + "word " * 20_000 + "'\n  c: d: e\n", "a:\n  b: " + "word" * 20_000 + ": c: d\n"):
        with pytest.raises(JobError, match="is not valid YAML"):
            parse_document(text, "job.yaml")
    assert time.process_time() - began < 5.0


def test_of_a_long_line_the_part_at_fault_is_shown() -> None:
    text = "{" + ", ".join(f"key{number}: {number}" for number in range(100)) + ", last: 1 key: 2, " + "x: 1, " * 100 + "}"
    with pytest.raises(JobError, match=r"^job.yaml:1: `….*last: 1 key: 2.*…` is not valid") as refused:
        parse_document(text, "job.yaml")
    assert len(str(refused.value)) < 300
