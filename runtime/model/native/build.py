"""The CPU kernels: compiled for this very processor, and loaded once per process."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from pathlib import Path

from runtime.compiler import BuildError, find_compiler, shared_library

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-Wno-psabi")


def available() -> tuple[bool, str]:
    """Whether the kernels can be used in this process, and where they are, or why not. Compiles them if need be."""
    found = _loaded()
    return (False, str(found)) if isinstance(found, BuildError) else (True, found._name)


def library() -> ctypes.CDLL:
    """The kernels. Raises BuildError."""
    found = _loaded()
    if isinstance(found, BuildError):
        raise found
    return found


@functools.cache
def _loaded() -> ctypes.CDLL | BuildError:
    try:
        openmp = None if find_compiler(os.environ.get("CXX")).is_clang else _openmp_of_torch()
        # Without -fopenmp its symbols stay open, to be found in the library that is loaded before.
        link_flags = ["-fopenmp"] if openmp is None else []
        path = shared_library("the CPU kernels", SOURCE, FLAGS, link_flags, depends_on=[_cpu()])
        if openmp is not None:
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return _declared(ctypes.CDLL(str(path), mode=os.RTLD_NOW))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the compiled kernels cannot be loaded ({error})")


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    kernels.outrider_scratch.argtypes = [pointer, count]
    kernels.outrider_head_scratch.argtypes = [pointer, count]
    kernels.outrider_scratch.restype = kernels.outrider_head_scratch.restype = count
    kernels.outrider_forward.argtypes = [pointer, pointer, count, count]
    kernels.outrider_search.argtypes = [pointer, count, *[pointer] * 4, count, *[pointer] * 3, count]
    kernels.outrider_units.argtypes, kernels.outrider_units.restype = [], ctypes.c_char_p
    kernels.outrider_choose.argtypes = [pointer, count, pointer, count, pointer, count, pointer, count]
    kernels.outrider_embed.argtypes = [pointer, pointer, count, count, pointer, count, pointer]
    kernels.outrider_draw.argtypes = [pointer, count, count, count, pointer, pointer, count]
    kernels.outrider_adjust.argtypes = [pointer, count, count, count, pointer]
    kernels.outrider_least.argtypes = [pointer, count, pointer, count, pointer]
    real = ctypes.c_double
    kernels.outrider_turns.argtypes = [pointer, count, real, real, pointer, count, pointer]
    for name in ("forward", "search", "choose", "embed", "turns", "draw", "adjust", "least"):
        getattr(kernels, f"outrider_{name}").restype = None
    return kernels


def _openmp_of_torch() -> Path | None:
    """The libgomp that torch has loaded. Kernels that use the same one share torch's threads, instead of having a
    second pool that waits spinning while torch's works. None: torch has another OpenMP."""
    import torch

    try:
        mapped = re.findall(r"(/\S*libgomp[^/\s]*\.so\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    except OSError:
        return None
    home = str(Path(torch.__file__).parent)
    return Path(min(mapped, key=lambda path: not path.startswith(home))) if mapped else None


def _cpu() -> str:
    """What -march=native depends on: caches are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in kinds}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
