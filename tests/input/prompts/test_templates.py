"""Templates: what they need, what they refuse, and that none can run away."""

from __future__ import annotations

import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tokabatch.errors import JobError, RowError
from tokabatch.input.prompts.templates import compile_template


def rendered(source: str, **row: Any) -> str | RowError:
    return compile_template(source, "prompt.template").render(row)


def code(source: str, **row: Any) -> str:
    result = rendered(source, **row)
    assert isinstance(result, RowError), result
    return result.code


def test_text_is_rendered_as_written() -> None:
    assert rendered("<b>{{ q }}</b>\n", q="a < b & {{ c }}") == "<b>a < b & {{ c }}</b>\n"
    assert rendered("{{ a ~ '-' ~ n ~ '!' }}", a="x", n=3) == "x-3!"
    assert rendered("{% for x in xs %}{{ loop.index }}/{{ loop.length }}:{{ x }};{% endfor %}", xs=["a", "b"]) == "1/2:a;2/2:b;"
    assert (
        rendered("{{ xs | join(', ') }} {{ 'ab' | replace('a', 'c') }} {{ q | tojson }}", xs=["a"], q={"a": 1})
        == 'a cb {"a": 1}'
    )
    assert rendered("{% for k in range(3) if k != 1 %}{{ k }}{% endfor %}") == "02"


def test_names_are_known_before_any_row() -> None:
    template = compile_template(
        "{{ a }}{{ b.c }}{% if d %}{{ d }}{% endif %}{{ e | default('') }}{% if f is defined %}{{ f }}{% endif %}"
        "{% for g in h %}{{ g }}{% endfor %}{{ range(2) | length }}",
        "t",
    )
    assert template.names == set("abdefh")
    assert template.required(()) == set("abdh")
    row = {name: name for name in "adfh"} | {"b": {"c": 1}}
    accepted = {name for name in "abdh" if isinstance(template.render(row | {name: None}), str)}
    assert accepted == {"d"}


def test_missing_and_null_fields() -> None:
    assert code("{{ q }}", r=1) == "missing_field"
    assert code("{{ q }}", q=None) == "missing_field"
    assert code("{{ q.title }}", q={}) == "missing_field"
    assert code("{{ q[3] }}", q=[1]) == "missing_field"
    assert rendered("{{ q | default('none') }}") == "none"
    assert rendered("{% if q is defined %}{{ q }}{% endif %}x") == "x"
    assert rendered("{% if q %}{{ q }}{% endif %}x", q=None) == "x"


@pytest.mark.parametrize(
    "source",
    ["{{ q or r }}", "{{ q if q else r }}", "{% if not q %}{{ r }}{% else %}{{ q }}{% endif %}", "{{ row['q'] or row.r }}"],
)
def test_a_column_that_is_tested_may_be_null_or_missing_in_some_rows_but_not_in_all(source: str) -> None:
    template = compile_template(source, "prompt.template")
    assert (template.names - {"row"}, template.required(("q",))) == ({"q", "r"}, {"q", "r"})
    assert [template.render(row) for row in ({"q": "a", "r": "b"}, {"q": "a"} | {"r": "b"})] == ["a", "a"]
    assert [template.render(row) for row in ({"q": None, "r": "b"}, {"q": "", "r": "b"}, {"r": "b"})] == ["b"] * 3
    assert isinstance(template.render({"q": None, "r": None}), RowError)


def test_a_column_of_any_name_is_read_from_the_row() -> None:
    row = {"Correct Answer": "x", "answer-1": 2, "true": "t", "q": "a"}
    assert rendered("{{ row['Correct Answer'] }}{{ row['answer-1'] + 1 }}{{ row.true }}{{ q }}", **row) == "x3ta"
    template = compile_template("{{ row['Correct Answer'] }}{{ row['none'] | default('-') }}", "prompt.template")
    assert template.names == {"row", "Correct Answer", "none"} and template.required(row) == {"Correct Answer"}
    assert template.render(row) == "x-"
    missing = template.render({"Correct answer": "x"})
    assert isinstance(missing, RowError) and missing.code == "missing_field"
    assert "did you mean 'Correct answer', written row['Correct answer']?" in missing.message
    assert missing.message.endswith("write {{ row['Correct Answer'] | default('') }}")


def test_a_column_called_row_is_itself() -> None:
    template = compile_template("{{ row['q'] }} {{ row.r }}", "prompt.template")
    assert template.required(("row", "q")) == {"row"} and template.required(("q",)) == {"q", "r"}
    assert template.render({"row": {"q": 1, "r": 2}, "q": 3}) == "1 2"
    assert code("{{ row['q'] }}", row=None, q=3) == "missing_field"
    assert code("{{ row | tojson }}", q=3) == "missing_field"
    assert rendered("{% for row in rows %}{{ row['q'] }}{% endfor %}", rows=[{"q": 1}, {"q": 2}]) == "12"


def test_messages_say_what_to_write_for_a_span_of_time_and_for_null() -> None:
    span = rendered("{{ d }}", d=timedelta(seconds=3))
    assert isinstance(span, RowError) and "write {{ d.total_seconds() }}" in span.message
    assert rendered("{{ d.total_seconds() }}", d=timedelta(seconds=3)) == "3.0"
    null = rendered("{% if q | length > 2 %}x{% endif %}", q=None)
    assert isinstance(null, RowError) and null.code == "bad_type" and "null in this row; for an optional column" in null.message


@pytest.mark.parametrize("source", ["Q: {{ question", "{{ q }}{% if a", "{% if q %}x"])
def test_what_is_left_open_is_to_be_closed(source: str) -> None:
    with pytest.raises(JobError, match=r"line 1: .*[^.]; close what was opened: \{\{ name \}\}"):
        compile_template(source, "prompt.template")


def test_the_spelling_of_names_of_two_words_is_suggested() -> None:
    with pytest.raises(JobError, match=r"not one word is written row\['its name'\]"):
        compile_template("{{ Correct Answer }}", "prompt.template")


def test_wrong_types_and_arithmetic_are_faults_of_the_row() -> None:
    assert code("{{ q + 1 }}", q="a") == "bad_type"
    assert code("{{ 1 / q }}", q=0) == "template_failed"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in xs %}{% for a in xs %}{% for a in xs %}{% for a in xs %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ text }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ 7**(7**9) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ text | replace('x', text) }}",
        "{{ text.replace('x', text) }}",
        "{{ text.join(text) }}",
        "{{ text | join(text) }}",
        "{% set ns = namespace(t='xxxxxxxx') %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t='xxxxxxxx') %}{% for a in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10**10) | list }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
        "{% set f = '{:1000000000d}'.format %}{{ f(1) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% set ns = namespace(n=10) %}{% for a in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l == ns.l }}",
        "{% set ns = namespace(l=1) %}{% for a in range(60) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=1) %}{% for a in range(60) %}{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(t=text) %}{% for a in range(60) %}{% set ns.t %}{{ ns.t }}{{ ns.t }}{% endset %}{% endfor %}",
        "{% macro m(n, t) %}{{ t if n == 0 else m(n - 1, t) ~ m(n - 1, t) }}{% endmacro %}{{ m(40, text) }}",
        "{{ lipsum(n=1000000) }}",
        "{{ 1.5 | round(10**9, 'ceil') }}",
        "{{ 10**1000 * 10**1000 * 10**1000 }}",
        "{{ (text * 500) | wordwrap(3) }}",
        "{{ xs | tojson(indent=10**6) }}",
        "{{ text | indent(10**8) }}",
        "{% set big = 'x' * 19000000 %}{% for a in range(99999) %}{% set y = big[1:] %}{% endfor %}",
        "{% set big = 'x' * 19000000 %}{% for a in range(99999) %}{% set y = big < (big ~ 'a') %}{% endfor %}",
        "{% set big = 'x' * 19000000 %}{% for a in range(99999) %}{% set y = big | upper %}{% endfor %}",
    ],
)
def test_no_template_runs_away(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokabatch.input.prompts.sandbox.MAX_CPU_SECONDS", 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    assert code(source, text="x" * 10_000, xs=list(range(100))) in ("template_too_large", "template_failed", "missing_field")
    assert time.thread_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ q.__init__.__globals__ }}", "{% set _ = q.append(1) %}"])
def test_the_sandbox_holds(source: str) -> None:
    assert code(source, q=[1]) in ("template_failed", "missing_field")


@pytest.mark.parametrize("source", ["{{ q", "{% for a in b %}", "{{ q | nosuchfilter }}", "{% include 'x' %}{% endif %}"])
def test_bad_syntax_names_the_key(source: str) -> None:
    with pytest.raises(JobError, match=r"prompt\.template is not a valid Jinja template"):
        compile_template(source, "prompt.template")


def test_large_values_that_are_no_attack_go_through() -> None:
    text = "word " * 2_000_000
    assert rendered("{{ q | trim }} {{ n | tojson }}", q=text, n=[{"a": ["b"] * 1000}] * 20).startswith("word word")
    messages = [{"role": "u", "content": "c"}] * 30_000
    assert rendered("{% for m in ms %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}", ms=messages) == "u: c\n" * 30_000
    assert rendered("{{ [q, 'b'] | join(' ') }}{{ {'a': q}['a'] }}", q="x") == "x bx"
    assert rendered("{{ n | string }} {{ n | abs }} {{ n + 1 }} {{ 1.234 | round(2) }}", n=10**12).startswith("10000000000")
    assert rendered("{% for a, b in [(1, q)] %}{{ a }}{{ b }}{% endfor %}", q="x") == "1x"


def test_the_name_of_a_file_is_no_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.j2").write_text("{{ q }}")
    for source in ("prompt.j2", "@prompt.j2", f" {tmp_path}/prompt.j2"):
        with pytest.raises(JobError, match=r"^prompt\.template is the text itself, but '.*' is a file; write the"):
            compile_template(source, "prompt.template")
    for source in ("other.j2", "@~/other.TXT", "~nobody/other.md"):
        with pytest.raises(JobError, match=r"is the name of a file, and there is none in /.*; write .* below `system: \|`"):
            compile_template(source, "prompt.system")
    for source in ("prompt.j2 {{ q }}", "{{ q }}.txt", "Read other.j2", "Really...", "3.5"):
        compile_template(source, "prompt.template")
