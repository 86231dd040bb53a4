"""Debian's packages unpacked into a folder: programs of their own for a test, and nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def unpack(packages: tuple[str, ...], folder: Path, root: Path, cached: str) -> str:
    """Unpack them, and what they need that is not installed here, into `root`; why that is not possible, else an empty string.
    They are fetched into `folder`, or into the one that the environment variable `cached` names, to be used again."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return "the packages are Debian's, and there is no apt-get"
    cache = Path(os.environ.get(cached, folder / "packages"))
    if not list(cache.glob("*.deb")):
        (cache / "partial").mkdir(parents=True)
        command = ["apt-get", "install", "-y", "--no-install-recommends", "--download-only", f"-oDir::Cache::archives={cache}"]
        try:
            done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False, timeout=120)
        except subprocess.TimeoutExpired:
            return f"{', '.join(packages)} cannot be fetched in two minutes"
        if done.returncode:
            return f"{', '.join(packages)} cannot be fetched: {done.stderr.strip()[-300:]}"
    for package in cache.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    return ""
