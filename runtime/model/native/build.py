"""Compiling the kernels, once per machine, and loading the result, once per process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.model.gguf import cache_root, locked

SOURCE = Path(__file__).with_name("kernels.cpp")
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fPIC", "-Wno-psabi")
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_S = 300.0


class BuildError(Exception):
    """There is no library of kernels here; the message says why."""


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
        compiler = _compiler()
        openmp = None if "clang" in compiler[-1] else _openmp_of_torch()
        path = _built(compiler[:-1], compiler[-1], links_openmp=openmp is None)
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
    kernels.outrider_logits.argtypes = [pointer, count, pointer, pointer, pointer, pointer, count]
    kernels.outrider_top.argtypes = [pointer, pointer, count, count, count, pointer, pointer, pointer, count]
    kernels.outrider_arrive.argtypes = [pointer, count]
    kernels.outrider_met.argtypes, kernels.outrider_met.restype = [pointer, count, count], count
    kernels.outrider_sum.argtypes = [pointer, count, count, pointer, count]
    kernels.outrider_units.argtypes, kernels.outrider_units.restype = [], ctypes.c_char_p
    for name in ("forward", "logits", "top", "arrive", "sum"):
        getattr(kernels, f"outrider_{name}").restype = None
    return kernels


def _compiler() -> tuple[str, ...]:
    """The command, and last what it says of its version. Raises BuildError if there is none."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else COMPILERS:
        command = shlex.split(name)
        if shutil.which(command[0]):
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S)
            if version.returncode == 0:
                return *command, version.stdout
    wanted = f"CXX={chosen}" if chosen else ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler found ({wanted}); install g++ or set CXX")


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


def _built(command: tuple[str, ...], version: str, links_openmp: bool) -> Path:
    """The shared library, compiled on the first call. Several processes may call this at once. Raises BuildError."""
    texts = (path.read_text() for path in (SOURCE, *HEADERS))
    parts = (*texts, version, _cpu(), *command, *FLAGS, str(links_openmp))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = cache_root() / "native" / f"kernels-{key}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            if not target.is_file():
                print(f"Compiling the CPU kernels (once; kept in {target.parent}) ...", file=sys.stderr, flush=True)
                compiled, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
                _run([*command, *FLAGS, "-c", str(SOURCE), "-o", compiled])
                # Without -fopenmp its symbols stay open, to be found in the library that is loaded before.
                _run([*command, "-shared", *(["-fopenmp"] if links_openmp else []), compiled, "-o", linked])
                os.replace(linked, target)
    except OSError as error:
        raise BuildError(f"the compiled kernels cannot be kept in {target.parent} ({error})") from error
    return target


def _cpu() -> str:
    """What -march=native depends on: caches are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in kinds}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0].strip() if lines else f'status {done.returncode}'}")
