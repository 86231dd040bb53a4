"""The Python files that a verifier consists of, so that an edited verifier is noticed. They are read, never run.

Besides the verifier's own file, those that it imports, directly or not, from its location: its folder or, for a module of an
installed package, that package. Other libraries are identified by version, which a fingerprint leaves out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tokabatch.job import verifier_names, verifier_path


def verifier_files(kind: str) -> dict[str, bytes]:
    """Return the contents of the verifier that `verify.kind` names: its own file under the name `kind`, the others under their
    paths relative to its location. Raises JobError for a module that does not exist, OSError for a file."""
    path = verifier_path(kind)
    found = {kind: path.read_bytes()}
    if kind in verifier_names():
        return found
    source = kind.partition(":")[0]
    root, package = path.resolve().parent, None
    if not source.endswith(".py"):
        for _ in range(source.count(".") + (path.name == "__init__.py")):
            root = root.parent
        package = None if root == Path.cwd() else source.partition(".")[0]
    seen, left = {path.resolve()}, [(path.resolve(), found[kind])]
    while left:
        file, content = left.pop()
        for name in _imported_names(content, file, root):
            if package is not None and name.partition(".")[0] != package:
                continue
            for each in _files_of(name, root):
                if each not in seen:
                    seen.add(each)
                    found[each.relative_to(root).as_posix()] = each.read_bytes()
                    left.append((each, found[each.relative_to(root).as_posix()]))
    return found


def _imported_names(content: bytes, file: Path, root: Path) -> Iterator[str]:
    """Iterate over the modules that a file may import, as names relative to `root`; none for a file that is not Python."""
    tree = ast.Module([], [])
    with suppress(SyntaxError, ValueError):
        tree = ast.parse(content)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = file.parent.relative_to(root).parts if node.level else ()
            prefix = [*inside[: len(inside) + 1 - max(node.level, 1)], *([node.module] if node.module else ())]
            yield from (".".join([*prefix, *more]) for more in ([], *([alias.name] for alias in node.names)))


def _files_of(name: str, root: Path) -> Iterator[Path]:
    """Iterate over a module's file below `root` and those of the packages around it, as far as they exist."""
    place = root
    for part in name.split("."):
        place /= part
        for file in (place.with_name(f"{part}.py"), place / "__init__.py"):
            if part and file.is_file():
                yield file
