"""From `model.path` to a folder on disk: a local folder as it is, a hub id through `hub`."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from tokabatch.errors import ModelError
from tokabatch.model.foreign_files import refuse_file


def resolve_model(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    *,
    weights: bool = True,
    key: str = "model.path",
    revision_key: str = "model.revision",
) -> Path:
    """Return the folder of a model; with `weights` False, only its small files need to be there. Raises ModelError with the
    remedy if there is none, and for a revision of a local folder; the user wrote the two under `key` and `revision_key`."""
    forms = f"{key} must be a model's folder or a hub id like `owner/name`."
    name = str(path_or_hub_id)
    local = Path(path_or_hub_id).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ModelError(
                f"{revision_key} {revision!r} has no effect: {key} {name!r} is a folder here ({local.absolute()}), and only "
                f"models of the hub have revisions. Remove {revision_key}; to use the hub's model of that name, start where "
                "there is no such folder."
            )
        return local
    if local.exists():
        refuse_file(local)
        raise ModelError(f"{name}: is a file. {forms}")
    if found := re.fullmatch(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/.*)?", name):
        raise ModelError(f"{name}: is a web address; write {found[1]}")
    if (found := re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", name)) and key != "model.tokenizer":
        raise ModelError(f"{name}: the revision is given by itself; write {found[1]} as {key}, {found[2]} as {revision_key}")
    if isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        where = "" if local.is_absolute() else f" (looked in {Path.cwd()})"
        raise ModelError(f"{name}: no such folder{where}{nearest_folder(local)}. {forms}")
    # Half of what a start from a local folder imports before it reads anything, and unused there.
    hub = import_module("tokabatch.model.hub")
    return hub.fetch_model(name, revision, weights=weights, key=key, revision_key=revision_key)


def nearest_folder(missing: Path) -> str:
    """Return a question for a message, naming the folder whose name is nearest to that of one that is missing; or nothing."""
    try:
        beside = sorted(each.name for each in missing.parent.glob("*/"))
    except OSError:
        return ""
    near = get_close_matches(missing.name, beside, n=1)
    return f" (did you mean {missing.with_name(near[0])}?)" if near else ""
