"""Telling people on stderr what takes time."""

from __future__ import annotations

import sys


def tell(text: str) -> None:
    """A line about what is being done."""
    print(text, file=sys.stderr, flush=True)
