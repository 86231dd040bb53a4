"""Templates: what they need, what they refuse, and that none can run away."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tokabatch.data.templates import compile_template
from tokabatch.errors import JobError, RowError


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
    assert template.required == set("abdh")
    assert template.non_null == set("abh")


def test_missing_and_null_fields() -> None:
    assert code("{{ q }}", r=1) == "missing_field"
    assert code("{{ q }}", q=None) == "missing_field"
    assert code("{{ q.title }}", q={}) == "missing_field"
    assert code("{{ q[3] }}", q=[1]) == "missing_field"
    assert rendered("{{ q | default('none') }}") == "none"
    assert rendered("{% if q is defined %}{{ q }}{% endif %}x") == "x"
    assert rendered("{% if q %}{{ q }}{% endif %}x", q=None) == "x"


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
    ],
)
def test_no_template_runs_away(source: str) -> None:
    began = time.monotonic()
    assert code(source, text="x" * 10_000, xs=list(range(100))) in ("template_too_large", "template_failed")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ q.__init__.__globals__ }}", "{% set _ = q.append(1) %}"])
def test_the_sandbox_holds(source: str) -> None:
    assert code(source, q=[1]) in ("template_failed", "missing_field")


@pytest.mark.parametrize("source", ["{{ q", "{% for a in b %}", "{{ q | nosuchfilter }}", "{% include 'x' %}{% endif %}"])
def test_bad_syntax_names_the_key(source: str) -> None:
    with pytest.raises(JobError, match=r"prompt\.template is no valid Jinja template"):
        compile_template(source, "prompt.template")
