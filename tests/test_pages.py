"""The pages that users read: their jobs load, their links lead somewhere, and the commands and options they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from tokabatch import Job
from tokabatch.cli import app
from tokabatch.report import key_reference

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name for name in ("README.md", "jobs/README.md", "jobs/operations.md", "tokabatch/README.md", "benchmarks/README.md")
]
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page):
    for name, rest in re.findall(r"\btokabatch ([a-z]+)\b([^\n`#]*)", "\n".join(_code(page.read_text()))):
        assert name in COMMANDS, f"tokabatch {name}"
        known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {option for option in re.findall(r"--[a-z-]+", rest)} <= known, f"tokabatch {name}{rest}"


def test_files_of_the_map_exist():
    text = (ROOT / "tokabatch" / "README.md").read_text()
    named = re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", text)
    rooms = re.findall(r"^\| `([a-z_/]+/)` \|", text, re.MULTILINE)
    places = [ROOT, ROOT / "tokabatch", *(ROOT / "tokabatch" / room for room in rooms)]
    assert len(named) > 40 and [name for name in named if not any((place / name).exists() for place in places)] == []


def test_jobs_load():
    jobs = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [Job.load(yaml.safe_load(job)).generation.n for job in jobs] == [16]


def test_the_reference_of_keys_is_that_of_the_schema():
    text = (ROOT / "jobs" / "README.md").read_text()
    expected = key_reference.markdown(Job.describe_sections())
    remedy = "replace what stands under `## Every key` by the output of `tokabatch keys --markdown`"
    assert text.endswith(f"\n\n{expected}\n"), remedy


def _code(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`(tokabatch [^`]+)`", text)
