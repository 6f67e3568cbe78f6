"""The C++ of the step (runtime/core), compiled on the machine."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from runtime.compiler import compile_extension, load_extension

WHAT = "the step"
SOURCE = Path(__file__).parent / "core" / "core.cpp"


def compiled() -> Path:
    """The extension module's file, compiled if need be. Raises BuildError."""
    return compile_extension(WHAT, SOURCE)


def load(name: str) -> ModuleType:
    """The module under this dotted name. Raises BuildError."""
    return load_extension(WHAT, name, compiled())
