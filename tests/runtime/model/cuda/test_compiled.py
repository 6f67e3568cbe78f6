"""Every kernel compiles for GPUs that are not there, and spills no registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.model.cuda import compiled
from runtime.model.cuda.compiled import Compiled
from runtime.model.cuda.jit import HAS_TRITON

ROOT = Path(__file__).resolve().parents[4]
MOST_SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that a program can have."""
KERNELS = {"add_norm", "gated", "embed", "move", "rotate_and_store", "dense", "tail", "blocks", "rows"}

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is needed: pip install triton")


def run(*options: str) -> list[Compiled]:
    """In a process of its own: here the interpreter may have taken the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "runtime.model.cuda.compiled", *options]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return compiled.parse(output)


def check(found: list[Compiled]) -> None:
    assert {one.kernel for one in found} == KERNELS
    assert {one.capability for one in found} == {80, 90}
    for one in found:
        assert one.spills == 0 and 0 < one.registers <= 255, one
        assert one.shared <= MOST_SHARED[one.capability], one


@pytest.mark.slow
def test_kernels_compile_and_do_not_spill_for_heads_of_128_features() -> None:
    found = run("--head-dim", "128", "--dtype", "bf16")
    check(found)
    assert any(one.shared > 0 and one.kernel == "dense" for one in found)


@pytest.mark.slow
def test_all_kernels_compile_and_do_not_spill() -> None:
    found = run()
    check(found)
    assert {int(size) for one in found for size in re.findall(r"d=(\d+)", one.case)} == set(compiled.HEAD_DIMS)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| `{name}` |" in page for name in KERNELS)
