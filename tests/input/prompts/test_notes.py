"""Notes on prompts that may not be what their author intended."""

from __future__ import annotations

from typing import Any

import pytest

from tokabatch.input.prompts.notes import Spelled, describe_prompts
from tokabatch.job import Job

SPELLED = Spelled(1200, (4, "<|end|>"))
ALLOW = {"special_tokens": "allow"}
FEW_SHOT = {"template": "{{ question }}", "few_shot": {"path": "x", "k": 2, "template": "Q"}}


def notes(prompt: dict[str, Any], **facts: Any) -> str:
    job = Job.load({"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}, "prompt": prompt})
    given = {"rows": 2, "spelled": Spelled(), "chat": False, "columns": ["question", "answer"], "special_texts": ["<|end|>"]}
    given["read"] = {"question"}
    return "\n".join(describe_prompts(job.prompt, **(given | facts)))


@pytest.mark.parametrize(
    ("prompt", "facts", "says"),
    [
        ({"template": "Q: {question}"}, {}, "names no column, so all 2 prompts are alike; write {{ question }} for {question}"),
        ({"template": "Q: { question }"}, {}, "write {{ question }} for {question}"),
        ({"template": "Q: {question}"}, {"rows": 1}, "prompt.template names no column; write {{ question }} for {question}"),
        (
            {"template": "Tell a joke."},
            {},
            "all 2 prompts are alike; write a column as {{ name }}; there are answer, question",
        ),
        ({"template": "{{ question }} {answer}"}, {}, "single braces, which are plain text; write {{ answer }} for {answer}"),
        ({"template": "{{ question }}", "system": "For {answer}"}, {}, "prompt.system has names of columns in single"),
        ({"template": "<|end|>{{ question }}"}, {"chat": True}, "writes the special token '<|end|>' itself"),
        (FEW_SHOT, {}, "prompt.few_shot.template names no column, so all 2 examples are alike; write a column as"),
        ({"template": r"{{ question }}\nAnswer:"}, {}, "prompt.template holds a backslash and 'n', as YAML's single quotes"),
        ({"template": r"{{ question }}\nAnswer:"}, {}, """(on a command line, 'prompt.template="...\\n..."')"""),
        ({"template": r"q: {{ question }}\na:"}, {}, "put the template in double quotes"),
        ({"template": "{{ question }}", "system": r"Be brief.\n\n"}, {}, "prompt.system holds a backslash and 'n'"),
        ({"template": "{{ question }} in \text{cm}"}, {}, r"holds a tab in front of 'ext', as \text becomes in double quotes"),
        (
            {"template": "{{ question }}", "system": "a \times b"},
            {},
            r"prompt.system holds a tab in front of 'imes', as \times",
        ),
        ({"template": "\right) {{ question }}"}, {}, "a carriage return in front of 'ight', as"),
        ({"template": "{{ question }} \neq 0"}, {}, "put the template in single quotes or below a block `|`"),
        ({"template": "{{ question }} \u2028ambda"}, {}, r"holds the character U+2028 in front of 'ambda', as \Lambda becomes"),
        (
            FEW_SHOT | {"few_shot": {"path": "x", "template": "Q: {{ question }}\nA:"}},
            {},
            "prompt.few_shot.template shows no column that a prompt does not (question), so the examples may lack their",
        ),
        ({"few_shot": {"path": "x", "template": "{{ prompt }}"}}, {}, r'as in "Question: {{ question }}\nAnswer: {{ answer }}'),
        (FEW_SHOT | {"few_shot": {"path": "x", "template": r"{{ q }}\n"}}, {}, "prompt.few_shot.template holds a backslash"),
        (
            {},
            {"spelled": SPELLED},
            "rows that spell special tokens: 1,200 (row 4: '<|end|>'), taken as plain text; if they hold chat",
        ),
        (
            {},
            {"columns": ["temperature", "max_tokens"]},
            "not settings of their rows, and not used: max_tokens, temperature. A row's",
        ),
        ({}, {"columns": ["top_p", "question"]}, 'a mapping in the column sampling_params: {"top_p": ...}'),
        ({}, {"spelled": SPELLED, "chat": True}, "write prompt.special_tokens: allow and prompt.chat: false"),
        (
            ALLOW,
            {"spelled": SPELLED, "chat": True},
            "taken as tokens, and put into the chat template; if they hold chat",
        ),
    ],
)
def test_it_says_what_to_write(prompt: dict[str, Any], facts: dict[str, Any], says: str) -> None:
    assert says in notes(prompt, **facts)


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ({"template": "{{ question }} {x} ${answer} \\\\frac{a}{b} {{ '{' }}"}, {}),
        ({"template": "Tell a joke."}, {"rows": 1}),
        ({"template": "{{ question }}\tto\tan\ttext\nu\ne\rhone\u2028Left"}, {}),
        ({"template": "{{ question }}", "system": "Be {brief}."}, {}),
        ({"template": "<|end|>{{ question }}"}, {}),
        (FEW_SHOT | {"few_shot": {"path": "x", "template": "{{ question }} {{ answer }}"}}, {}),
        ({"few_shot": {"path": "x", "template": "{{ text }}"}}, {}),
        ({}, {}),
    ],
)
def test_it_says_nothing_of_ordinary_prompts(prompt: dict[str, Any], facts: dict[str, Any]) -> None:
    assert notes(prompt, **facts) == ""


@pytest.mark.parametrize(
    "template",
    ["{{ question }}\n", r"{{ question | join('\n') }}", r"{{ question }} \neq \nabla f", r"{{ question }} \nRightarrow a"],
)
def test_newlines_and_commands_of_latex_are_as_written(template: str) -> None:
    assert notes({"template": template}) == ""
