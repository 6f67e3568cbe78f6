"""Triton where it can be had: torch's CUDA builds bring it along; elsewhere the eager functions beside the kernels do.

With TRITON_INTERPRET=1 set before this module is imported, kernels run on the CPU, one program after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = None
    HAS_TRITON = False


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit; without Triton the function as it is, which nobody calls then."""
    return triton.jit(function) if HAS_TRITON else function


def is_interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on tensors in the CPU's memory."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
