"""The C++ of the step (runtime/core), compiled on the machine, or elsewhere for a machine that cannot."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from types import ModuleType

from runtime.compiler import compile_extension, load_extension
from runtime.progress import tell

WHAT = "the step"
SOURCE = Path(__file__).parent / "core" / "core.cpp"
PREBUILT = "OUTRIDER_PREBUILT"
"""Names a folder with the extension compiled elsewhere (`python -m runtime.gpu_check.wheels`)."""


def compiled() -> Path:
    """The extension module's file, compiled if need be. Raises BuildError."""
    if folder := os.environ.get(PREBUILT):
        path = Path(folder) / carried_name(str(sysconfig.get_config_var("EXT_SUFFIX")))
        if path.is_file():
            return path
        tell(f"{PREBUILT}={folder} has no {path.name}, which this Python and these sources take; compiling it")
    return compile_extension(WHAT, SOURCE)


def carried_name(suffix: str) -> str:
    """The extension's file where it is carried from one machine to another: it tells the sources and, by the `suffix`
    of extension modules, the Python."""
    sources = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
    key = hashlib.sha256("\0".join(path.read_text() for path in sources).encode()).hexdigest()[:16]
    return f"core-{key}{suffix}"


def load(name: str) -> ModuleType:
    """The module under this dotted name. Raises BuildError."""
    return load_extension(WHAT, name, compiled())
