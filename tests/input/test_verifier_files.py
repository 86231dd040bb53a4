"""What a verifier imports from where it lies counts as it does; what else it imports does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokabatch.input.verifier_files import verifier_files


def write(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)


def test_a_file_and_what_it_imports_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = "import json, numpy, helpers\ndef verify(text, row):\n    from lib.deep import f\n    return f(text)"
    files = {
        "judge.py": judge,
        "helpers.py": "import judge, more as other  # a circle",
        "more.py": "no Python",
        "unused.py": "",
        "lib/deep.py": "from . import near\nfrom ..above import f",
        "lib/near.py": "",
        "above.py": "",
    }
    write(tmp_path, files)
    kind, others = str(tmp_path / "judge.py:verify"), files.keys() - {"judge.py", "unused.py"}
    assert verifier_files(kind).keys() == {kind, *others}
    monkeypatch.chdir(tmp_path)
    assert verifier_files("judge:verify").keys() == {"judge:verify", *others}


def test_a_module_of_a_package_and_what_it_imports_of_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "graders/__init__.py": "",
        "graders/length.py": "import beside\nfrom .words import count",
        "graders/words.py": "from graders.lists import WORDS",
        "graders/lists.py": "WORDS = []",
        "graders/other.py": "",
        "beside.py": "",
    }
    write(tmp_path, files)
    monkeypatch.syspath_prepend(tmp_path)
    found = verifier_files("graders.length:grade")
    assert found.keys() == {"graders.length:grade", "graders/words.py", "graders/lists.py", "graders/__init__.py"}
    assert found["graders/lists.py"] == b"WORDS = []"


def test_those_that_come_with_the_package() -> None:
    assert verifier_files("gsm8k").keys() == {"gsm8k"}
