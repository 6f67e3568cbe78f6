"""Reading the small files of a checkpoint, and saying what is wrong with one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError

LFS_POINTER = b"version https://git-lfs"


def flaw(path: Path) -> tuple[str, str] | None:
    """What anyone can see is wrong with a file, and the remedy: not there, empty, a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        return "no such file", "Fetch it again."
    except OSError as error:
        return error.strerror or "cannot be read", "Mend what keeps it from being read."
    if not head:
        return "is empty", "Fetch it again."
    if head == LFS_POINTER:
        return "is a Git LFS pointer, not the file itself", "Run git lfs pull in its folder, or fetch it again."
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ConfigError naming the file."""

    def refused(problem: str, remedy: str) -> ConfigError:
        return ConfigError("model.path", str(path.parent), f"{path.name} {problem}", remedy)

    if found := flaw(path):
        raise refused(*found)
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise refused(f"is not UTF-8 text ({error.reason})", "Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise refused(f"is not JSON ({error})", "Mend the file.") from error
    if not isinstance(content, dict):
        raise refused("is not a JSON object", "Mend the file.")
    return content
