"""The folder of a local Ray: short enough for the sockets in it, its own, and gone afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from runtime.errors import ConfigError

LONGEST = 36
"""Bytes of the folder's path. A socket's path may have 107 (sun_path), and Ray appends
/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store, with room for a suffix."""

FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")


def make() -> Path:
    """A new folder under RAY_TMPDIR, TMPDIR or else where the system keeps such things.

    Raises ConfigError, naming TMPDIR, if there is no place that is short enough and can be written to.
    """
    named = [os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR")]
    problems = []
    for place in [*filter(None, named), *FALLBACKS]:
        folder = os.path.abspath(place)
        try:
            made = tempfile.mkdtemp(prefix="ray-", dir=folder)
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
            continue
        if len(os.fsencode(made)) <= LONGEST:
            return Path(made)
        os.rmdir(made)
        problems.append(f"{place}: longer than its sockets' paths allow")
    problem = f"there is no place for a local Ray's folder ({'; '.join(problems)})"
    remedy = f"Set it, or RAY_TMPDIR, to a folder that can be written to, of at most {LONGEST - 13} characters."
    raise ConfigError("TMPDIR", os.environ.get("TMPDIR"), problem, remedy)


def remove(folder: Path) -> None:
    """Remove the folder with what Ray has left in it."""
    shutil.rmtree(folder, ignore_errors=True)
