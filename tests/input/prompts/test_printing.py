"""What templates write: texts, numbers and dates, never what Python shows of an object."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.errors import JobError, RowError
from tokabatch.input.prompts.templates import compile_template

ROW: dict[str, Any] = {
    "text": "hi <b> {x} %s",
    "number": 7,
    "fraction": 0.25,
    "flag": True,
    "null": None,
    "void": None,
    "nan": float("nan"),
    "endless": float("inf"),
    "binary": b"\xff\xfe",
    "words": ["nut", "bolt"],
    "gaps": ["nut", None],
    "order": {"id": 1, "items": ["nut"], "values": 3, "copy": "x", "hint": None, "inner": {"keys": "k"}},
    "pairs": [("k", "v")],
    "objects": [{"name": "a", "count": 2}, {"name": "b", "count": 3}],
    "day": date(2024, 1, 2),
    "moment": datetime(2024, 1, 2, 3, 4, 5),
    "clock": time(3, 4),
    "pause": timedelta(days=1),
    "price": Decimal("1E+2"),
    "range": "R",
    "dict": {"k": "v"},
    "cycler": 4,
    "joiner": "J",
    "namespace": "N",
    "lipsum": "L",
}
PYTHON = re.compile(
    r"built-in|bound method|object at 0x|<function|<class|<generator|<macro|<templatereference|<loopcontext|<namespace|<cycler|"
    r"<joiner|undefined|dict_|range\(|none|\bnan\b|\binf\b|datetime\.|timedelta|decimal\(|b'|\['|\{'|\('|\+0?j\b",
    re.IGNORECASE,
)


def rendered(source: str, row: dict[str, Any] | None = None) -> str | RowError:
    return compile_template(source, "prompt.template").render(ROW if row is None else row)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ text }} {{ number }} {{ fraction }} {{ flag }}", "hi <b> {x} %s 7 0.25 True"),
        ("{{ day }} {{ moment }} {{ clock }} {{ price }}", "2024-01-02 2024-01-02 03:04:05 03:04:00 100"),
        ("{{ order['values'] }} {{ order.copy }} {{ order.values }}", "3 x 3"),
        ("{{ order.items | join(', ') }} {{ order.inner.keys }} {{ order['items'][0] }}", "nut k nut"),
        ("{% for k, v in order.inner.items() %}{{ k }}={{ v }}{% endfor %} {{ dict.get('k') }}", "keys=k v"),
        ("{{ words | join(' and ') }} {{ objects | join('/', attribute='count') }}", "nut and bolt 2/3"),
        (
            "{{ objects | map(attribute='name') | map('upper') | join }} {{ words | map('length') | list | tojson }}",
            "AB [3, 4]",
        ),
        ("{{ words | tojson }} {{ order.inner | tojson }} {{ gaps | tojson }}", '["nut", "bolt"] {"keys": "k"} ["nut", null]'),
        ("{{ text[:6] | tojson }} {{ 'é' | tojson }}", '"hi <b>" "é"'),
        ("{{ {'b': moment, 'a': price} | tojson }}", '{"b": "2024-01-02 03:04:05", "a": "100"}'),
        ("{{ range }} {{ cycler }} {{ joiner }} {{ namespace }} {{ lipsum }} {{ dict.k }}", "R 4 J N L v"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}{{ dict(a=1).a }}", "0121"),
        ("{% set ns = namespace(n=1) %}{{ ns.n }}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}", "1ab"),
        ("{% macro range(x) %}[{{ x }}]{% endmacro %}{{ range(3) }}", "[3]"),
        ("{{ null | default('-') }}{{ nan | default('-') }}{{ nosuch | default('-') }}{{ order.hint | d('-') }}", "----"),
        ("{{ order.nosuch | default('-') }}{{ gaps[1] | default('-') }}{{ number | default('-') }}", "--7"),
        ("{{ {'a': 'b c'} | urlencode }}{{ {'a': 'b', 'c': none} | xmlattr }}", 'a=b+c a="b"'),
        ("{{ (text | e) ~ (text | safe) | length }}", "hi &lt;b&gt; {x} %s13"),
    ],
)
def test_texts_numbers_and_dates_are_written(source: str, text: str) -> None:
    assert rendered(source) == text


WAYS = [
    "{{ %s }}",
    "{{ %s | string }}",
    "{{ %s | upper }}",
    "{{ %s | trim }}",
    "{{ %s | e }}",
    "{{ %s | safe }}",
    "{{ %s | truncate(9) }}",
    "{{ %s | replace('a', 'b') }}",
    "{{ 'abc' | replace('b', %s) }}",
    "{{ [%s, 'a'] | join('-') }}",
    "{{ ['a', 'b'] | join(%s) }}",
    "{{ 'a' ~ %s }}",
    "{{ '%%s' %% (%s,) }}",
    "{{ '%%s' | format(%s) }}",
    "{{ '{}'.format(%s) }}",
    "{{ '{x}'.format_map({'x': %s}) }}",
    "{{ {'a': %s} | urlencode }}",
    "{{ ('a' | safe) ~ %s }}",
    "{{ ('a' | safe).join([%s]) }}",
    "{% set x %%}{{ %s }}{%% endset %%}{{ x }}",
    "{%% filter upper %%}{{ %s }}{%% endfilter %%}",
    "{%% macro m(x) %%}{{ x }}{%% endmacro %%}{{ m(%s) }}",
    "{%% for x in [%s] %%}{{ x }}{%% endfor %%}",
    "{{ [%s] | map('string') | first }}",
    "{{ %s if true }}",
    "{{ nosuch | default(%s) }}",
]
REFUSED = {
    "missing_field": ["null", "nan", "gaps[1]", "order.hint", "order.nosuch", "words[9]", "nosuch", "none"],
    "bad_type": [
        "endless",
        "binary",
        "words",
        "order",
        "pairs",
        "pause",
        "text.title",
        "order.get",
        "order.inner.items",
        "range(3)",
        "namespace(a=1)",
        "cycler('a')",
        "words | map('upper')",
        "words | reverse",
        "order.items()",
        "order | dictsort",
        "(0 - 8) ** 0.5",
        "text.encode('utf-16')",
    ],
}


@pytest.mark.parametrize(("code", "value"), [(code, value) for code, values in REFUSED.items() for value in values])
def test_what_has_no_text_is_refused_wherever_it_becomes_text(code: str, value: str) -> None:
    for way in WAYS:
        way = way.replace("{% set", "{%% set")
        result = rendered(way % f"({value})")
        assert isinstance(result, RowError), (way, value, result)
        formatting = "template_failed" if "printf-style" in result.message else code
        expected = {formatting, "bad_type"} if "default(" in way or ".join(" in way else {formatting}
        assert result.code in expected, (way, value, result)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ order.items }}", r"`order\.items` is a list, .* \{\{ order\.items \| join\(', '\) \}\}.* \| tojson"),
        ("{{ order }}", r"`order` is an object, .*\{\{ order \| tojson \}\}"),
        ("{{ order.get }}", r"`order\.get` is a method, .* write \{\{ order\.get\(\) \}\}"),
        ("{{ order.hint }}", r"`order\.hint` is null in this row; .* \{\{ order\.hint \| default\(''\) \}\}"),
        ("{{ gaps[1] }}", r"`gaps\[1\]` is null in this row"),
        ("{{ nan }}", r"`nan` is NaN in this row"),
        ("{{ binary }}", r"`binary` is binary"),
        ("{{ order.itms }}", r"no field 'itms' \(did you mean 'items'\?\); it has .*default"),
        ("{{ ordr }}", r"'ordr' is missing in this row \(did you mean 'order'\?\).*\{\{ ordr \| default\(''\) \}\}"),
        ("{{ void }} {{ null }}", r"'null' is null in this row \(so is 'void'\); .*\{\{ null \| default\(''\) \}\}"),
        ("{{ null | tojson }}", r"'null' is null in this row; .* put default\(''\) in front of its other filters"),
        ("{{ row['null'] | join(', ') | upper }}", r"'null' is null in this row; .* in front of its other filters"),
        ("{{ null }}", r"'null' is null in this row; .*\{\{ null \| default\(''\) \}\}"),
    ],
)
def test_the_message_says_what_it_is_and_what_to_write(source: str, message: str) -> None:
    result = rendered(source)
    assert isinstance(result, RowError) and re.search(message, result.message), result


@pytest.mark.parametrize(
    "source",
    [
        "{{ words | random }}",
        "{{ words | pprint }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{% autoescape true %}{{ text }}{% endautoescape %}",
        "{{ f(a=1, a=2) }}",
        "{{ " + "9" * 5000 + " }}",
        "{% if a %}" * 100 + "{% endif %}" * 100,
    ],
)
def test_what_no_prompt_can_use_is_refused_at_once(source: str) -> None:
    with pytest.raises(JobError, match=r"prompt\.template"):
        compile_template(source, "prompt.template")


NAMES = st.sampled_from([*ROW, "nosuch", "order.items", "order.inner", "order.keys", "words[0]", "gaps[1]", "loop", "self"])
LITERALS = st.sampled_from(["'a'", "'{}'", "'%s'", "3", "0.5", "true", "none", "[]", "{}", "[1, 'b']", "{'k': 1}", "(1, 2)"])
FILTERS = st.sampled_from(sorted(compile_template("", "t").sandbox.filters.keys() - {"wordwrap", "_shown", "_method"}))
METHODS = st.sampled_from(
    "items keys get copy title join split format encode count index real hex isoformat strftime next".split()
)


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arguments = st.lists(inner, max_size=2).map(", ".join)
    return st.one_of(
        st.builds("({} | {})".format, inner, FILTERS),
        st.builds("({} | {}({}))".format, inner, FILTERS, arguments),
        st.builds("({} | map('{}') | list)".format, inner, FILTERS),
        st.builds("({}).{}".format, inner, METHODS),
        st.builds("({}).{}({})".format, inner, METHODS, arguments),
        st.builds("({})[{}]".format, inner, inner),
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "~", "%", "==", "in", "and", "or"]), inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{'k': {}}}".format, inner),
        st.builds(
            "{}({})".format, st.sampled_from(["range", "dict", "cycler", "joiner", "namespace", "m", "caller"]), arguments
        ),
    )


EXPRESSIONS = st.recursive(NAMES | LITERALS, grown, max_leaves=6)
STATEMENTS = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% for x in {} %}}{{{{ x }}}}{{{{ loop.index }}}}{{% endfor %}}".format, EXPRESSIONS),
    st.builds("{{% if {} %}}{{{{ {} }}}}{{% endif %}}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("{{% set x = {} %}}{{{{ x ~ {} }}}}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("{{% set x %}}{{{{ {} }}}}{{% endset %}}{{{{ x | upper }}}}".format, EXPRESSIONS),
    st.builds("{{% macro m(x) %}}{{{{ x }}}}{{{{ {} }}}}{{% endmacro %}}{{{{ m({}) }}}}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("{{% filter {} %}}{{{{ {} }}}}{{% endfilter %}}".format, FILTERS, EXPRESSIONS),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STATEMENTS, min_size=1, max_size=3).map("".join))
def test_no_prompt_ever_shows_python(source: str) -> None:
    try:
        template = compile_template(source, "prompt.template")
    except JobError:
        return
    result = template.render(ROW)
    assert isinstance(result, RowError) or not PYTHON.search(result), (source, result)


def test_binary_columns_of_parquet_are_text_where_they_are_utf8(tmp_path: Path, ingest_job: Any, texts: Any) -> None:
    inner = pa.struct([("title", pa.large_binary()), ("tags", pa.list_(pa.binary()))])
    table = pa.table(
        {
            "q": pa.array([b"hello", "café".encode(), b"\xff", None], pa.binary()),
            "doc": pa.array([{"title": b"A", "tags": [b"x", b"\xff"]}] * 4, inner),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    store = ingest_job(tmp_path / "rows.parquet", prompt={"template": "{{ q[:4] }} {{ doc.title }} {{ doc.tags[0] }}"})
    assert texts(store)[:2] == ["hell A x", "café A x"]
    assert {row: error.code for row, error in store.errors.items()} == {2: "bad_type", 3: "missing_field"}
    store = ingest_job(tmp_path / "rows.parquet", prompt={"template": "{{ q }}"})
    assert "`q` is binary" in store.errors[2].message
    assert store.columns(pa.array([0]).to_numpy()).column("q").to_pylist() == [b"hello"]


def test_json_of_a_template_can_be_read_back() -> None:
    row = {"d": {"a": "x < y & 'z' \u2028", "n": [1, 2.5, None, True]}}
    assert json.loads(str(rendered("{{ d | tojson }}", row))) == row["d"]
    assert json.loads(str(rendered("{{ d | tojson(indent=2) }}", row))) == row["d"]
