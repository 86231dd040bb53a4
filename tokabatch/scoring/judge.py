"""Loading and calling a judge: the function that says how good a sample's text is. Imports nothing heavy: judges have processes
of their own, which begin with this.

    verify(text: str, row: Mapping[str, Any], **options) -> verdict           one sample
    verify(texts: list[str], rows: list[Mapping], **options) -> [verdict]     several; its first parameter is called `texts`

A verdict is True or False, a number (the score), None (there is no telling), or a mapping `{"score": ..., column: ...}` whose
further keys the file declares: `COLUMNS = {"extracted": str}`, each of them str, int, float or bool. The file may have
`check_options(**options)`, which raises ValueError for options that are wrong for any row and refuses the job, and
`check(row, **options)`, which raises ValueError where a row cannot be judged, whatever the text: it is called for all rows
before anything is computed, at each start, and again before the samples of a row are judged, which get no verdict if it raises.
Both get those of the options that they name, or all with `**options`. A judge that raises costs the verdict of that sample
alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from traceback import extract_tb, walk_tb
from types import ModuleType
from typing import Any

from tokabatch.number_text import counted

ANSWER = "extracted"
"""The column with the answer that a judge extracts from the text, if it does: what a majority is counted over."""
MAX_REASON = 200
MAX_TEXT = 1 << 16
_KEPT_FAULTS = 1 << 16
COLUMN_TYPES: Mapping[type, str] = {str: "string", int: "int64", float: "float64", bool: "bool"}
"""The types that a judge's columns may have, and the Arrow type of each."""


_VERIFIERS = Path(__file__).with_name("verifiers")
_TEXTS = frozenset({"text", "texts", "completion", "completions", "response", "responses", "prediction", "predictions"})
_ROWS = frozenset({"row", "rows"})
_REFERENCES = frozenset({"reference", "answer", "expected", "gold", "ground_truth"})
_INPUTS = frozenset({"prompt", "problem", "question"})
"""Names of parameters that say what an author takes them to be: the sample's text, the input's row, a value of one column, what
the model was given."""


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """The function that judges: `function` of the Python file `source`, or of the module of that name. `kind` is the job's
    word; `answer` is the column of the reference answer, for functions that take it; `memory_bytes` limits a process."""

    kind: str
    source: str
    function: str
    answer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    correct_from: float = 1.0
    memory_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of one sample. `error` is why there is none; `columns` are the judge's own."""

    correct: bool | None
    score: float | None
    error: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def none(cls, reason: str) -> Verdict:
        return cls(None, None, _well_formed(" ".join(reason.split())[:MAX_REASON]))


def verdict_columns(verdicts: Sequence[Verdict | None], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of verdict columns, by name; null for a sample without a verdict."""
    own = {"correct": "correct", "verify_score": "score", "verify_error": "error"}
    return {
        name: [
            None if verdict is None else getattr(verdict, own[name]) if name in own else verdict.columns.get(name)
            for verdict in verdicts
        ]
        for name in names
    }


def _is_plain(function: object) -> bool:
    return not (inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function))


class _Default:
    """The default of a parameter that is more than a plain value."""

    def __repr__(self) -> str:
        return "..."


def _written(parameters: Sequence[inspect.Parameter]) -> inspect.Signature:
    """Return what prints as the parameters do in the judge's file, without annotations."""
    plain = (bool, int, float, str, type(None))
    defaults = [
        each.default if each.default is each.empty or isinstance(each.default, plain) else _Default() for each in parameters
    ]
    bare = [each.replace(annotation=each.empty, default=default) for each, default in zip(parameters, defaults, strict=True)]
    return inspect.Signature(bare)


class Judge:
    """A loaded judge. Raises ValueError, with the remedy, for one that cannot be called."""

    def __init__(self, spec: JudgeSpec) -> None:
        module = _load(spec)
        self._file = getattr(module, "__file__", None)
        self._is_of_package = Path(self._file or "").parent == _VERIFIERS
        function = getattr(module, spec.function, None)
        if not callable(function):
            own = [
                (len(inspect.signature(each).parameters) < 2, name)
                for name, each in inspect.getmembers(module, inspect.isfunction)
                if each.__module__ == module.__name__ and not name.startswith("_") and _is_plain(each)
            ]
            named = f", or name another: {spec.source}:{min(own)[1]}" if own else ""
            raise ValueError(f"it has no function `{spec.function}(text, row)`; add one{named}")
        if not _is_plain(function):
            raise ValueError(f"its `{spec.function}` is async or has `yield`; write a plain `def` that returns the verdict")
        named = _parameters(function)
        if named is None:
            raise ValueError(f"its `{spec.function}` is not written in Python; write a plain `def {spec.function}(text, row)`")
        parameters = list(named.values())
        written = f"{spec.function}{_written(parameters)}"
        by_place = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        if len(by_place) < 2 and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
            raise ValueError(f"its `{written}` is called with a text and its row; write `{spec.function}(text, row)`")
        first, second = [*(each.name for each in by_place), "", ""][:2]
        if first.lower() in _ROWS or (second.lower() in _TEXTS and first.lower() in _REFERENCES | _INPUTS):
            remedy = "exchange the two" if second else f"write `{spec.function}(text, row)`"
            raise ValueError(f"its `{written}` is called with the text first and the row second; {remedy}")
        if second.lower() in _REFERENCES:
            raise ValueError(
                f"its `{written}` is called with a text and the whole row of the input; write `{spec.function}({first}, row)`, "
                f"where row[COLUMN] is the {second}"
            )
        self._function: Callable[..., Any] = function
        self._options = _options(spec, parameters[2:])
        _refuse_call(spec.function, function, ("", {}), self._options)
        check_options, self._check = (_function(module, name) for name in ("check_options", "check"))
        if check_options is not None:
            named = self._named(check_options)
            _refuse_call("check_options", check_options, (), named)
            try:
                check_options(**named)
            except BaseException as error:
                raise ValueError(self._reason(error, of_check=True)) from error
        if self._check is not None:
            self._check_options = self._named(self._check)
            _refuse_call("check", self._check, ({},), self._check_options)
        self._faults: dict[bytes, str | None] = {}
        """Why rows cannot be judged, or None, by their digests."""
        self._correct_from = spec.correct_from
        self.takes_batches = bool(parameters) and parameters[0].name == "texts"
        self.columns: dict[str, str] = {}
        declared = getattr(module, "COLUMNS", {})
        if not isinstance(declared, Mapping):
            raise ValueError("its COLUMNS is not a mapping; write names and types, such as {'found': str}")
        for name, kind in declared.items():
            if not isinstance(kind, type) or kind not in COLUMN_TYPES:
                raise ValueError(f"COLUMNS[{name!r}] is {kind!r}; write str, int, float or bool")
            self.columns[str(name)] = COLUMN_TYPES[kind]
        self._declared: dict[str, type] = dict(declared)

    def _named(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the options that the function names; all if it takes any by `**`, and is not a wrapper that takes anything."""
        parameters = _parameters(function) or {}
        kinds = {each.kind for each in parameters.values()}
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
        return {name: value for name, value in self._options.items() if takes_any or name in parameters}

    def check(self, row: Mapping[str, Any]) -> str | None:
        """Return why no text of this row can be judged; None if it can, or if the judge does not say."""
        if self._check is None:
            return None
        try:
            self._check(row, **self._check_options)
        except BaseException as error:
            return self._reason(error, of_check=True)
        return None

    def verdicts(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Return a verdict for each text; what the judge raises becomes the verdict's `error`, and what it returns is
        checked. The judge is not called for a row that its `check` rejects, whose reason becomes the `error`."""
        if self._check is None or self._is_of_package:
            # The verifiers of the package raise the same for such a row themselves.
            return self._judged(texts, rows)
        faults = [self._fault(row) for row in rows]
        accepted = [place for place, fault in enumerate(faults) if fault is None]
        judged = iter(self._judged([texts[place] for place in accepted], [rows[place] for place in accepted]))
        return [next(judged) if fault is None else Verdict.none(fault) for fault in faults]

    def _fault(self, row: Mapping[str, Any]) -> str | None:
        """As `check`, which is called once for the samples of a row, unless many others are judged in between."""
        digest = hashlib.blake2b(pickle.dumps(row), digest_size=16).digest()
        if digest not in self._faults:
            if len(self._faults) >= _KEPT_FAULTS:
                self._faults.clear()
            self._faults[digest] = self.check(row)
        return self._faults[digest]

    def _judged(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        if not texts:
            return []
        if not self.takes_batches:
            pairs = zip(texts, rows, strict=True)
            return [self._verdict(partial(self._function, text, row, **self._options)) for text, row in pairs]
        try:
            returned = list(self._function(list(texts), list(rows), **self._options))
            if len(returned) != len(texts):
                raise ValueError(f"it returned {counted(len(returned), 'verdict')} for {counted(len(texts), 'text')}")
        except BaseException as error:
            if len(texts) == 1:
                return [Verdict.none(self._reason(error))]
            # One of them is at fault: judge them one by one, so that the others keep their verdicts.
            return [verdict for text, row in zip(texts, rows, strict=True) for verdict in self._judged([text], [row])]
        return [self._verdict(lambda value=value: value) for value in returned]

    def _verdict(self, call: Callable[[], Any]) -> Verdict:
        try:
            returned = call()
            columns: dict[str, Any] = {}
            if isinstance(returned, Mapping):
                columns = {name: value for name, value in returned.items() if name != "score"}
                if unknown := [name for name in columns if name not in self._declared]:
                    verdict = "" if "score" in returned else "; the verdict itself is returned as 'score'"
                    value = columns[unknown[0]]
                    kind = type(value).__name__ if type(value) in COLUMN_TYPES else "str"
                    remedy = f'add "{unknown[0]}": {kind} to COLUMNS = {{...}} in its file'
                    raise TypeError(f"it returned {unknown[0]!r}, a column that it does not declare; {remedy}{verdict}")
                given = {name: value for name, value in columns.items() if value is not None}
                columns = {name: _plain(value, name, self._declared[name]) for name, value in given.items()}
                if "score" not in returned:
                    return Verdict(None, None, "it returned no 'score', which is the verdict", columns)
                returned = returned["score"]
            if returned is not None and hasattr(returned, "item"):  # A number of NumPy's or Torch's.
                returned = returned.item()
            if returned is None:
                return Verdict(None, None, "it returned None", columns)
            if not isinstance(returned, (bool, int, float)) or not math.isfinite(returned):
                raise TypeError(f"it returned {str(returned)[:80]!r}, which is not a verdict: True, False, a number or None")
            score = float(returned)
            return Verdict(returned if isinstance(returned, bool) else score >= self._correct_from, score, None, columns)
        except BaseException as error:
            return Verdict.none(self._reason(error))

    def _reason(self, error: BaseException, *, of_check: bool = False) -> str:
        """Return why the judge failed, with the line of its file. By a ValueError, `check` and the verifiers of the package say
        that a row cannot be judged: its message alone."""
        try:
            words = " ".join(str(error).split())
        except Exception:  # an exception whose own text fails
            words = ""
        places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
        known = all(file == __file__ for file, _ in places) or self._is_of_package
        if type(error) is ValueError and words and (known or of_check):
            return words[:MAX_REASON]
        lines = [] if known else [line for file, line in places if file == self._file]
        where = f" in line {lines[-1]}" if lines else ""
        said = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return said[: MAX_REASON - len(where)] + where


def _function(module: ModuleType, name: str) -> Callable[..., Any] | None:
    found = getattr(module, name, None)
    return found if callable(found) else None


def _load(spec: JudgeSpec) -> ModuleType:
    if spec.source.endswith(".py") and not Path(spec.source).exists():
        raise ValueError(f"there is no file {Path(spec.source).absolute()}; check the path")
    try:
        if not spec.source.endswith(".py"):
            sys.path.insert(0, os.getcwd())
            return importlib.import_module(spec.source)
        path = Path(spec.source).resolve()
        # As for a script, modules beside the file can be imported.
        sys.path.insert(0, str(path.parent))
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module
        # Without a __pycache__, which Python takes for current after an edit within the same second.
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), module.__dict__)
        return module
    except BaseException as error:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        frames = [each for each in extract_tb(error.__traceback__) if Path(each.filename) == Path(spec.source).resolve()]
        where = f" in line {frames[-1].lineno}" if frames else ""
        remedy = "correct the file, or name another judge"
        if name is not None and name.partition(".")[0] != spec.source.partition(".")[0]:
            remedy = (
                f"the module {name} that it imports is not there: check the name, put a file of yours beside the judge, or "
                "install the package that has it (whose name may be another)"
            )
            if name == "math_verify":
                remedy = "install what it imports: pip install 'tokabatch[math]'"
        raise ValueError(f"it cannot be loaded ({type(error).__name__}{where}: {error}); {remedy}") from error


def _refuse_call(name: str, function: Callable[..., Any], places: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise ValueError if the function does not take these arguments, as far as Python can tell."""
    parameters = _parameters(function)
    if parameters is None:
        return
    try:
        inspect.Signature(list(parameters.values())).bind(*places, **options)
    except TypeError as error:
        what, remedy = (
            ("the options alone, to find those that are wrong for any row", "give a default to each, or give it another name"),
            ("a row alone, to find rows that cannot be judged", f"write `{name}(row)`, or give it another name"),
            ("a text and its row", f"write `{name}(text, row)`"),
        )[len(places)]
        written = f"{name}{_written(list(parameters.values()))}"
        raise ValueError(f"its `{written}` is called with {what}: {error}; {remedy}") from None


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function; None for one written in C that does not name them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _options(spec: JudgeSpec, parameters: Sequence[inspect.Parameter]) -> dict[str, Any]:
    """Return the keyword arguments of each call, checked against the parameters after text and row."""
    any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    names = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = dict(spec.options)
    if spec.answer is not None and ("answer" in names or any_name):
        given["answer"] = spec.answer
    unknown = [name for name in given if name not in names and not any_name]
    if unknown:
        known = ", ".join(name for name in names if name != "answer" or spec.answer is None) or "none"
        raise ValueError(f"verify.options names {unknown[0]!r}, which it does not take; it takes {known}")
    required = [each.name for each in parameters if each.name in names and each.default is each.empty]
    missing = [name for name in required if name not in given]
    if missing:
        key = "verify.answer" if missing[0] == "answer" else f"verify.options.{missing[0]}"
        raise ValueError(f"it needs {missing[0]!r}; give {key}")
    return given


def _plain(value: Any, name: str, kind: type) -> Any:
    """Return a column's value as declared; for text, the `str` of any value. Raises TypeError for a value of another type."""
    value = value.item() if hasattr(value, "item") else value
    if kind is str:
        return _well_formed(str(value)[:MAX_TEXT])
    if not (isinstance(value, (int, float)) if kind is float else type(value) is kind):
        raise TypeError(f"it returned {str(value)[:80]!r} as {name!r}, which COLUMNS declares as {kind.__name__}")
    if kind is int and not -(1 << 63) <= value < 1 << 63:
        raise OverflowError(f"{str(value)[:80]} is beyond the 64 bits of an int in COLUMNS; declare it as str")
    return kind(value)


def _well_formed(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can express and UTF-8 cannot, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
